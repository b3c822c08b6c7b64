"""The kernel of the elementwise methods: one walk over a tensor in chunks that fit the cache, one result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..linear import linear_coefficients
from ..tensors import CHUNK, Task, sorted_keys, weighted_sum


# Biases, norms and scalars are too small for a density to mean anything.
MIN_SPARSE_NUMEL = 100

Combine = Callable[[int, list[Tensor]], Tensor]
# `drop(key, start, chunks)`: T chunks of a tensor from flat index `start` on, with entries set to zero.
Drop = Callable[[str, int, list[Tensor]], list[Tensor]]


def spans(numel: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Starts and stops of the chunks of a tensor; all but the last have an even number of whole `multiple`s."""
    size = max(2, CHUNK // multiple // 2 * 2) * multiple
    return ((start, min(start + size, numel)) for start in range(0, numel, size))


def merge_chunks(tasks: Sequence[Task], key: str, combine: Combine, multiple: int = 1) -> Tensor:
    """
    One merged tensor, computed chunk by chunk in order: nothing of T times its size is ever held.

    Args:
        tasks (`Sequence[Task]`):
            T tasks.
        key (`str`):
            Name of the tensor.
        combine (`Callable`):
            `combine(start, chunks)` merges T chunks, the flat entries from `start` on.
        multiple (`int`, *optional*, defaults to 1):
            Chunks are whole multiples of so many entries, such as a row.

    Returns:
        `Tensor`: of the shape of the inputs, float64 if one of them is, else float32; rounded to it chunk by chunk.
    """
    shape = tasks[0].shape(key)
    dtype = torch.float64 if any(task.dtype(key) == torch.float64 for task in tasks) else torch.float32
    merged = None
    for start, stop in spans(shape.numel(), multiple):
        piece = combine(start, [task.chunk(key, start, stop) for task in tasks])
        if merged is None:
            merged = torch.empty(shape.numel(), dtype=dtype, device=piece.device)
        merged[start:stop] = piece
    assert merged is not None, "Empty tensors take the plain merge."
    return merged.view(shape)


def plain_sum(tasks: Sequence[Task], key: str, coefficients: Sequence[float]) -> Tensor:
    """One tensor of `sum_t coefficient_t * tensor_t`, chunk by chunk."""
    if tasks[0].shape(key).numel() == 0:
        return tasks[0].tensor(key)
    return merge_chunks(tasks, key, lambda start, chunks: weighted_sum(chunks, coefficients))


def sum_kept(tasks: Sequence[Task], key: str, drop: Drop, coefficients: Sequence[float], multiple: int = 1) -> Tensor:
    """One tensor of `sum_t coefficient_t * kept_t`; see [`merge_chunks`]."""
    return merge_chunks(
        tasks, key, lambda start, chunks: weighted_sum(drop(key, start, chunks), coefficients), multiple
    )


def split_small(tasks: Sequence[Task], min_sparse_numel: int) -> tuple[list[str], list[str]]:
    """Tensor names that get masks, and those too small for them (empty tensors always are)."""
    keys = sorted_keys(tasks)
    numels = {key: tasks[0].shape(key).numel() for key in keys}
    limit = max(1, min_sparse_numel)
    return [key for key in keys if numels[key] >= limit], [key for key in keys if numels[key] < limit]


def merge_each(
    tasks: Sequence[Task], min_sparse_numel: int, normalize: bool, merge: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Every tensor by its name: `merge(key)`, or a plain mean (or sum) where it is too small for masks."""
    keys, small = split_small(tasks, min_sparse_numel)
    merged = {key: merge(key) for key in keys}
    if small:
        coefficients = linear_coefficients("mean", [task.weight for task in tasks], normalize=normalize)
        merged.update({key: plain_sum(tasks, key, coefficients) for key in small})
    return {key: merged[key] for key in sorted(merged)}
