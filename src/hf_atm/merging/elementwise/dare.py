"""DARE: drop entries at random, make up for them, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..linear import linear_coefficients
from ..registry import register_merge_method
from ..tensors import canonical_tasks
from .chunks import MIN_SPARSE_NUMEL, merge_each, sum_kept
from .elections import Election, merge_elected
from .random_masks import kept_shares, lane_limits, random_drop


@register_merge_method("dare", "dare_linear", family="elementwise", per_tensor=True)
def dare(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = True,
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    DARE: drop entries at random, rescale the rest, average (https://huggingface.co/papers/2311.03099).

    `sum_t w_t m_t tau_t / (density * sum_t w_t)` with `m_t ~ Bernoulli(density)`: its expectation over seeds is the
    mean, and `density=1` is the mean. The paper's drop rate is `1 - density`. Densities are rounded to multiples of
    2^-32, and it is the rounded one that kept entries are divided by.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; with the seed and the tensor name they decide the masks.
        density (`float`):
            Fraction kept, in (0, 1]; .1 and .5 are usual. There is no default.
        seed (`int`, *optional*, defaults to 0):
            Decides all masks, which do not depend on process, device, input order or hash seed.
        rescale (`bool`, *optional*, defaults to `True`):
            Whether kept entries are divided by `density`.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide by the sum of the weights; `False` gives DARE with task arithmetic.
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
    factor = _factor(density, rescale)
    scaled = [coefficient * factor for coefficient in coefficients]

    def merge(key: str) -> Tensor:
        return sum_kept(tasks, key, random_drop(tasks, key, density, seed), scaled)

    return merge_each(tasks, min_sparse_numel, normalize, merge)


@register_merge_method("dare_ties", family="elementwise", per_tensor=True)
def dare_ties(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float,
    seed: int = 0,
    rescale: bool = True,
    majority_sign_method: str = "total",
    weighted_vote: bool = False,
    merge_func: str = "mean",
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    DARE-TIES: entries dropped at random as in [`dare`], then sign election and disjoint merge as in [`ties`].

    See https://huggingface.co/papers/2311.03099. Draws of the vote take the majority sign of their tensor.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights of the values; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; with the seed and the tensor name they decide the masks.
        density (`float`):
            Fraction kept, in (0, 1]. There is no default.
        seed (`int`, *optional*, defaults to 0):
            Decides all masks.
        rescale (`bool`, *optional*, defaults to `True`):
            Whether kept entries are divided by `density`.
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
    # One factor for all tasks changes neither signs nor what agrees.
    election = Election(
        [task.weight for task in tasks], majority_sign_method, weighted_vote, merge_func, _factor(density, rescale)
    )

    def merge(key: str) -> Tensor:
        return merge_elected(tasks, key, random_drop(tasks, key, density, seed), election)

    return merge_each(tasks, min_sparse_numel, merge_func != "sum", merge)


def _factor(density: float, rescale: bool) -> float:
    """What makes up for the dropped entries: one over the share that is kept."""
    return 1 / float(kept_shares(lane_limits(density))) if rescale else 1.0
