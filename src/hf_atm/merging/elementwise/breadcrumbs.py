"""Breadcrumbs: neither the largest entries nor the small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..linear import linear_coefficients
from ..registry import register_merge_method
from ..tensors import Task, canonical_tasks
from .chunks import MIN_SPARSE_NUMEL, Drop, merge_each, sum_kept
from .elections import Election, merge_elected
from .trimming import find_cuts, kept_count, trim


@register_merge_method("breadcrumbs", family="elementwise", per_tensor=True)
def breadcrumbs(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float = 0.143,
    gamma: float = 0.007,
    normalize: bool = True,
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    Breadcrumbs: drop outliers and small entries of every tensor (https://huggingface.co/papers/2312.06795).

    Of n entries ordered by magnitude the top `floor(gamma * n)` are dropped, the next `max(1, floor(density * n))`
    are kept, the rest is dropped. Deviation: the paper sums the masked task vectors and tunes a scale; here the
    default is their mean, which is safe at scale one inside ATM. Small tensors take the mean.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        density (`float`, *optional*, defaults to 0.143):
            Fraction kept, in (0, 1], with `gamma + density <= 1`.
        gamma (`float`, *optional*, defaults to 0.007):
            Share of largest entries dropped, in [0, 1).
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide by the sum of the weights; `False` is the paper's sum.
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
        return sum_kept(tasks, key, _crumbs(tasks, key, density, gamma), coefficients)

    return merge_each(tasks, min_sparse_numel, normalize, merge)


@register_merge_method("breadcrumbs_ties", family="elementwise", per_tensor=True)
def breadcrumbs_ties(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float = 0.143,
    gamma: float = 0.007,
    majority_sign_method: str = "total",
    weighted_vote: bool = False,
    merge_func: str = "mean",
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    Breadcrumbs with sign election: entries dropped as in [`breadcrumbs`], then merged as in [`ties`].

    A combination that mergekit offers, without a paper of its own. Draws of the vote take the majority sign of their
    tensor.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        density (`float`, *optional*, defaults to 0.143):
            Fraction kept, in (0, 1], with `gamma + density <= 1`.
        gamma (`float`, *optional*, defaults to 0.007):
            Share of largest entries dropped, in [0, 1).
        majority_sign_method (`str`, *optional*, defaults to `"total"`):
            `"total"` or `"frequency"`.
        weighted_vote (`bool`, *optional*, defaults to `False`):
            Whether the votes are weighted as the values are.
        merge_func (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"max"`.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries take the plain mean (the plain sum if `merge_func="sum"`).

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean, unless `"sum"`.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    election = Election([task.weight for task in tasks], majority_sign_method, weighted_vote, merge_func)

    def merge(key: str) -> Tensor:
        return merge_elected(tasks, key, _crumbs(tasks, key, density, gamma), election)

    return merge_each(tasks, min_sparse_numel, merge_func != "sum", merge)


def _crumbs(tasks: Sequence[Task], key: str, density: float, gamma: float) -> Drop:
    """Keeps the entries of one tensor that rank behind the outliers and before the rest."""
    numel = tasks[0].shape(key).numel()
    dropped = min(kept_count(gamma, numel), numel - 1)
    kept = max(1, kept_count(density, numel))
    cuts = [find_cuts(task, [key], [min(dropped + kept, numel), dropped]) for task in tasks]
    larger, outliers = (trim(side) for side in zip(*cuts, strict=True))

    def drop(key: str, start: int, chunks: list[Tensor]) -> list[Tensor]:
        # Equal magnitudes are ordered by index at both cuts, so that the outliers lie among the larger entries.
        pairs = zip(larger(key, start, chunks), outliers(key, start, chunks), strict=True)
        return [large.sub_(outlier) for large, outlier in pairs]

    return drop
