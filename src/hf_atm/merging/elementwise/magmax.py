"""MagMax: of every entry the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..registry import register_merge_method
from ..tensors import canonical_tasks
from .chunks import merge_chunks, merge_each


@register_merge_method("magmax", family="elementwise", per_tensor=True)
def magmax(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """
    MagMax: every entry comes from the task that changed it most (https://huggingface.co/papers/2407.06322).

    The result is `w_t tau_t` of the task with the largest `|w_t tau_t|`, entry by entry; of equal ones that of the
    task whose name sorts last. The authors, who train tasks one after the other, scale the result by .5.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights; they count in the comparison, too.
        names (`Sequence[str]`):
            T different task names; they decide between equal magnitudes.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: between a mean and a sum; the
        norm is at least that of every single task vector.
    """
    tasks = canonical_tasks(task_vectors, weights, names)

    def combine(start: int, chunks: list[Tensor]) -> Tensor:
        best = chunks[0].double() * tasks[0].weight
        for task, chunk in zip(tasks[1:], chunks[1:], strict=True):
            value = chunk.double() * task.weight
            best = torch.where(value.abs() >= best.abs(), value, best)
        return best

    return merge_each(tasks, 0, False, lambda key: merge_chunks(tasks, key, combine))
