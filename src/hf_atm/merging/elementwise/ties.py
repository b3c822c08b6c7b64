"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..registry import get_merge_method, register_merge_method
from ..tensors import Task, canonical_tasks
from .chunks import MIN_SPARSE_NUMEL, merge_each, split_small
from .elections import Election, majority_sign, merge_elected
from .trimming import Cut, find_cuts, kept_count, trim


@dataclass(frozen=True)
class TiesContext:
    """What TIES must know of the whole model: where each task is cut, and the sign that draws take."""

    cuts: tuple[Cut, ...]
    majority: int


def prepare_ties(
    task_vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], names: Sequence[str], **kwargs: Any
) -> TiesContext | None:
    """Thresholds and majority sign over the whole model; `None` with `trim_scope="tensor"`, which needs neither."""
    options = {**get_merge_method("ties").parameters, **kwargs}
    tasks = canonical_tasks(task_vectors, weights, names)
    keys, _ = split_small(tasks, options["min_sparse_numel"])
    if options["trim_scope"] == "tensor" or not keys:
        return None
    cuts = _cuts(tasks, keys, options["density"])
    election = Election([task.weight for task in tasks], options["majority_sign_method"], options["weighted_vote"])
    # One voter makes no draw.
    majority = 1 if len(tasks) == 1 else majority_sign(tasks, keys, trim(cuts), election)
    return TiesContext(cuts, majority)


@register_merge_method("ties", family="elementwise", per_tensor=True, prepare=prepare_ties)
def ties(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float = 0.2,
    trim_scope: str = "model",
    majority_sign_method: str = "total",
    weighted_vote: bool = False,
    merge_func: str = "mean",
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
    context: TiesContext | None = None,
) -> dict[str, Tensor]:
    """
    TIES: trim, elect signs, merge what agrees (https://huggingface.co/papers/2306.01708).

    Each task keeps its `density` share of largest magnitudes; each entry elects a sign; the entries of that sign are
    combined. Deviations from the authors' code: exactly `max(1, floor(density * n))` entries are kept (theirs keeps
    all entries equal to the threshold, 37 % instead of 20 % on bfloat16 deltas), ties going to the lowest index in
    sorted tensor order; small tensors take the mean.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights of the values; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        density (`float`, *optional*, defaults to 0.2):
            Fraction kept, in (0, 1].
        trim_scope (`str`, *optional*, defaults to `"model"`):
            Rank magnitudes over the whole `"model"`, as the authors, or within each `"tensor"`, as most libraries.
        majority_sign_method (`str`, *optional*, defaults to `"total"`):
            `"total"`: sign of the summed values; `"frequency"`: sign of the summed signs. A draw takes the sign of
            the sum of all elected signs in the trim scope, and plus if that is zero.
        weighted_vote (`bool`, *optional*, defaults to `False`):
            Whether the votes are weighted as the values are.
        merge_func (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over the agreeing (absolute) weights, `"sum"` or `"max"` (largest magnitude).
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries are neither ranked nor trimmed and take the plain mean (the plain sum if
            `merge_func="sum"`).

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean, unless `"sum"`.

    Cost: the task vectors are read about twice, with `"model"` three times (thresholds, majority, merge); memory is
    the merged tensor and the square of the cube root of the number of ranked entries.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    election = Election([task.weight for task in tasks], majority_sign_method, weighted_vote, merge_func)
    if context is None:
        context = prepare_ties(
            task_vectors,
            weights,
            names,
            density=density,
            trim_scope=trim_scope,
            majority_sign_method=majority_sign_method,
            weighted_vote=weighted_vote,
            min_sparse_numel=min_sparse_numel,
        )

    def merge(key: str) -> Tensor:
        if context is None:
            return merge_elected(tasks, key, trim(_cuts(tasks, [key], density)), election)
        return merge_elected(tasks, key, trim(context.cuts), election, context.majority)

    return merge_each(tasks, min_sparse_numel, merge_func != "sum", merge)


def _cuts(tasks: Sequence[Task], keys: Sequence[str], density: float) -> tuple[Cut, ...]:
    """Where each task is cut so that its `density` share of largest entries of some tensors is kept, but one at least."""
    count = max(1, kept_count(density, sum(tasks[0].shape(key).numel() for key in keys)))
    return tuple(find_cuts(task, keys, [count])[0] for task in tasks)
