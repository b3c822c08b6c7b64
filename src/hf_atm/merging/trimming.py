"""Trimming by magnitude: exactly so many entries are kept, equal ones by their place in sorted tensor order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from .chunks import spans
from .selection import Numbers, Rank, count, kth_largest, sample_step
from .tensors import Task


class Cut(NamedTuple):
    """What is kept of one task: entries above the threshold, and those equal to it before one place.

    Args:
        threshold (`float`): a magnitude.
        key (`str`): tensor in which the last equal entry lies.
        stop (`int`): flat index behind it.
    """

    threshold: float
    key: str
    stop: int

    def apply(self, chunk: Tensor, key: str, start: int) -> Tensor:
        """The entries of `key` from `start` on, with those that are dropped set to zero."""
        equal = chunk.numel() if key < self.key else 0
        if key == self.key:
            equal = min(max(self.stop - start, 0), chunk.numel())
        # One vectorised pass each; a mask of booleans would cost ten.
        if equal == chunk.numel():
            return hardshrink(chunk, _below(self.threshold, chunk.dtype, strictly=True))
        kept = hardshrink(chunk, _below(self.threshold, chunk.dtype, strictly=False))
        if equal:
            kept[:equal] = hardshrink(chunk[:equal], _below(self.threshold, chunk.dtype, strictly=True))
        return kept


def trim(cuts: Sequence[Cut]) -> Callable[[str, int, list[Tensor]], list[Tensor]]:
    """`drop(key, start, chunks)`: the chunks of T tasks, each after its cut."""

    def drop(key: str, start: int, chunks: list[Tensor]) -> list[Tensor]:
        return [cut.apply(chunk, key, start) for cut, chunk in zip(cuts, chunks, strict=True)]

    return drop


def kept_count(fraction: float, numel: int) -> int:
    """`floor(fraction * numel)`, safe against products such as `0.29 * 100 = 28.999999999999996`."""
    return min(numel, int(fraction * numel * (1 + 1e-12)))


def find_cuts(task: Task, keys: Sequence[str], counts: Sequence[int]) -> list[Cut]:
    """
    Where to cut so that the largest entries of some tensors, ranked together, are kept.

    Args:
        task (`Task`):
            The task.
        keys (`Sequence[str]`):
            Sorted names of the tensors.
        counts (`Sequence[int]`):
            Numbers of entries to keep, one per cut; equal magnitudes go to the first tensors and lowest indices.

    Returns:
        `list[Cut]`: one per count.
    """
    total = sum(task.shape(key).numel() for key in keys)
    wide = any(task.dtype(key) == torch.float64 for key in keys)
    dtype = np.dtype(np.float64 if wide else np.float32)
    ranked = [kept for kept in counts if 0 < kept < total]

    def pieces() -> Iterator[Sequence[Numbers]]:
        return ([piece] * len(ranked) for _, _, piece in _magnitudes(task, keys, dtype))

    sample = _sample(task, keys, total, dtype) if ranked else np.empty(0, dtype)
    ranks = iter(kth_largest([sample] * len(ranked), pieces, total, ranked) if ranked else ())
    nothing, everything = Cut(np.inf, keys[-1], 0), Cut(0.0, keys[-1], 0)
    return [
        _locate(task, keys, next(ranks), dtype) if 0 < kept < total else everything if kept else nothing
        for kept in counts
    ]


def _locate(task: Task, keys: Sequence[str], rank: Rank, dtype: np.dtype[Any]) -> Cut:
    """The cut that keeps the first `rank.places` entries equal to the threshold."""
    left = rank.places
    # Zeros need no places: keeping or dropping them gives the same task vector.
    if left < rank.equal and rank.value > 0:
        for key, start, piece in _magnitudes(task, keys, dtype):
            equal = piece == rank.value
            here = count(equal)
            if here >= left:
                return Cut(rank.value, key, start + int(np.flatnonzero(equal)[left - 1]) + 1)
            left -= here
    return Cut(rank.value, keys[-1], task.shape(keys[-1]).numel())


def _magnitudes(task: Task, keys: Sequence[str], dtype: np.dtype[Any]) -> Iterator[tuple[str, int, Numbers]]:
    for key in keys:
        for start, stop in spans(task.shape(key).numel()):
            yield key, start, _magnitude(task.chunk(key, start, stop), dtype)


def _magnitude(chunk: Tensor, dtype: np.dtype[Any]) -> Numbers:
    # Half as long in NumPy as in torch, and the comparisons that follow a tenth.
    return np.abs(chunk.cpu().numpy().astype(dtype, copy=False))


def _sample(task: Task, keys: Sequence[str], total: int, dtype: np.dtype[Any]) -> Numbers:
    """Every so many entries of the tensors one after the other, so that each entry counts the same."""
    step, start, sampled = sample_step(total), 0, []
    for key in keys:
        numel = task.shape(key).numel()
        if start < numel:
            sampled.append(_magnitude(task.strided(key, start, step), dtype))
        start = (start - numel) % step
    return np.concatenate(sampled)


def _below(value: float, dtype: torch.dtype, strictly: bool) -> float:
    """The largest number of a type that is at most (or less than) a value."""
    numpy_type = np.float64 if dtype == torch.float64 else np.float32
    rounded = float(numpy_type(value))
    if rounded > value or (strictly and rounded == value):
        rounded = float(np.nextafter(numpy_type(value), numpy_type(-1)))
    return rounded
