"""Trimming by magnitude: exactly so many entries are kept, equal ones by their place in sorted tensor order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ..tensors import Task
from .chunks import Drop, spans
from .selection import FEW, Numbers, Rank, kth_largest, sample_step


# From T pieces at the same places, one array of numbers per ranking.
Scores = Callable[[list[Tensor]], list[Numbers]]


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


def trim(cuts: Sequence[Cut]) -> Drop:
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
    ranked = [kept for kept in counts if 0 < kept < total]
    dtype = _numpy_type(task, keys)

    def scores(pieces: list[Tensor]) -> list[Numbers]:
        return [_magnitude(pieces[0], dtype)] * len(ranked)

    ranks = iter(rank_entries([task], keys, scores, ranked))
    nothing, everything = Cut(np.inf, keys[-1], 0), Cut(0.0, keys[-1], 0)
    return [
        _cut(task, keys, next(ranks), dtype) if 0 < kept < total else everything if kept else nothing
        for kept in counts
    ]


def rank_entries(tasks: Sequence[Task], keys: Sequence[str], scores: Scores, ks: Sequence[int]) -> list[Rank]:
    """
    Exact k-th largest scores over all entries of some tensors.

    Args:
        tasks (`Sequence[Task]`):
            T tasks.
        keys (`Sequence[str]`):
            Sorted names of the tensors, none of them empty.
        scores (`Callable`):
            From T pieces at the same places, one array of scores per ranking, each always of one floating type.
        ks (`Sequence[int]`):
            One rank per ranking, from 1 to the number of entries; the tensors are not read if there are none.

    Returns:
        `list[Rank]`: one per ranking; its pieces are those of [`spans`], tensor after tensor.
    """
    if not ks:
        return []
    total = sum(tasks[0].shape(key).numel() for key in keys)

    def numbers() -> Iterator[Sequence[Numbers]]:
        for key, start, stop in _places(tasks[0], keys):
            yield scores([task.chunk(key, start, stop) for task in tasks])

    if total <= FEW:
        gathered = list(numbers())
        return kth_largest([piece[:0] for piece in gathered[0]], lambda: gathered, total, ks)
    return kth_largest(_samples(tasks, keys, scores, sample_step(total)), numbers, total, ks)


def _samples(tasks: Sequence[Task], keys: Sequence[str], scores: Scores, step: int) -> list[Numbers]:
    """Every so many scores of the tensors one after the other, so that each entry counts the same."""
    start, samples = 0, []
    for key in keys:
        numel = tasks[0].shape(key).numel()
        if start < numel:
            samples.append(scores([task.strided(key, start, step) for task in tasks]))
        start = (start - numel) % step
    return [np.concatenate(each) for each in zip(*samples, strict=True)]


def _cut(task: Task, keys: Sequence[str], rank: Rank, dtype: np.dtype[Any]) -> Cut:
    """The cut that keeps the first `rank.places` entries equal to the threshold."""
    left = rank.places
    for (key, start, stop), equal in zip(_places(task, keys), rank.equal, strict=True):
        if left <= equal:
            if left < equal:
                indices = np.flatnonzero(_magnitude(task.chunk(key, start, stop), dtype) == rank.value)
                stop = start + int(indices[left])
            return Cut(rank.value, key, stop)
        left -= equal
    raise AssertionError("A rank has no more places than equal entries.")


def _places(task: Task, keys: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Tensor, start and stop of all chunks in order."""
    return ((key, start, stop) for key in keys for start, stop in spans(task.shape(key).numel()))


def _numpy_type(task: Task, keys: Sequence[str]) -> np.dtype[Any]:
    """The type that holds the magnitudes of all the tensors."""
    wide = any(task.dtype(key) == torch.float64 for key in keys)
    return np.dtype(np.float64 if wide else np.float32)


def _magnitude(chunk: Tensor, dtype: np.dtype[Any]) -> Numbers:
    # Half as long in NumPy as in torch, and the comparisons that follow a tenth.
    return np.abs(chunk.cpu().numpy().astype(dtype, copy=False))


def _below(value: float, dtype: torch.dtype, strictly: bool) -> float:
    """The largest number of a type that is at most (or less than) a value."""
    numpy_type = np.float64 if dtype == torch.float64 else np.float32
    rounded = float(numpy_type(value))
    if rounded > value or (strictly and rounded == value):
        rounded = float(np.nextafter(numpy_type(value), numpy_type(-1)))
    return rounded
