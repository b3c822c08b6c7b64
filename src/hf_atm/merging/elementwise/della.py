"""DELLA: drop entries at random, the small ones more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..linear import linear_coefficients
from ..registry import register_merge_method
from ..tensors import canonical_tasks
from .chunks import MIN_SPARSE_NUMEL, merge_each, sum_kept
from .elections import Election, merge_elected
from .random_masks import ranked_drop, row_length


# Half the width of the ramp of probabilities.
EPSILON = 0.15


@register_merge_method("della", family="elementwise", per_tensor=True)
def della(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float,
    epsilon: float = EPSILON,
    seed: int = 0,
    rescale: bool = True,
    majority_sign_method: str = "total",
    weighted_vote: bool = False,
    merge_func: str = "mean",
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    DELLA: drop small entries more often than large ones, elect signs, merge (https://huggingface.co/papers/2406.11617).

    Within each row (a tensor of one dimension is one row; kernels of higher dimension are flattened behind the first)
    the n entries are ranked by magnitude, smallest first, equal ones by index. The entry of rank i is kept with
    probability `q = density - epsilon + 2 * epsilon * i / (n - 1)` and then divided by it, so that the expectation
    over seeds is the input; a row of one entry has `q = density`. Then signs are elected and merged as in [`ties`];
    [`della_linear`] leaves the election out, under the names that mergekit gave the two.

    The paper's epsilon is the full width of the ramp, mergekit's and this one half of it. float64 magnitudes are
    ranked as float32. Draws of the vote take the majority sign of their tensor.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights of the values; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; with the seed and the tensor name they decide the masks.
        density (`float`):
            Mean fraction kept, in (0, 1]. There is no default.
        epsilon (`float`, *optional*, defaults to 0.15):
            Half the width of the ramp; 0 < density - epsilon and density + epsilon <= 1.
        seed (`int`, *optional*, defaults to 0):
            Decides all masks.
        rescale (`bool`, *optional*, defaults to `True`):
            Whether kept entries are divided by their probability of being kept.
        majority_sign_method (`str`, *optional*, defaults to `"total"`):
            `"total"` or `"frequency"`.
        weighted_vote (`bool`, *optional*, defaults to `False`):
            Whether the votes are weighted as the values are.
        merge_func (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"max"`.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries take the plain mean (the plain sum if `merge_func="sum"`).

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean over the values
        that agree and were kept, unless `"sum"`.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    election = Election([task.weight for task in tasks], majority_sign_method, weighted_vote, merge_func)

    def merge(key: str) -> Tensor:
        drop = ranked_drop(tasks, key, density, epsilon, seed, rescale)
        return merge_elected(tasks, key, drop, election, multiple=row_length(tasks[0].shape(key)))

    return merge_each(tasks, min_sparse_numel, merge_func != "sum", merge)


@register_merge_method("della_linear", family="elementwise", per_tensor=True)
def della_linear(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float,
    epsilon: float = EPSILON,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = True,
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    DELLA without election: drop by rank as in [`della`], rescale the rest, average.

    `sum_t w_t m_t tau_t / q_t / sum_t w_t` with `m_t ~ Bernoulli(q_t)`: its expectation over seeds is the mean.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; with the seed and the tensor name they decide the masks.
        density (`float`):
            Mean fraction kept, in (0, 1]. There is no default.
        epsilon (`float`, *optional*, defaults to 0.15):
            Half the width of the ramp; 0 < density - epsilon and density + epsilon <= 1.
        seed (`int`, *optional*, defaults to 0):
            Decides all masks, which do not depend on process, device, input order or hash seed.
        rescale (`bool`, *optional*, defaults to `True`):
            Whether kept entries are divided by their probability of being kept.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide by the sum of the weights; `False` gives sums.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries skip the mask.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean, unless
        `normalize=False`.

    Raises:
        `ValueError`: if the weights sum to zero and `normalize=True`.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    coefficients = linear_coefficients("mean", [task.weight for task in tasks], normalize=normalize)

    def merge(key: str) -> Tensor:
        drop = ranked_drop(tasks, key, density, epsilon, seed, rescale)
        return sum_kept(tasks, key, drop, coefficients, row_length(tasks[0].shape(key)))

    return merge_each(tasks, min_sparse_numel, normalize, merge)
