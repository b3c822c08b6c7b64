"""Exact order statistics of more numbers than fit into memory: one pass almost always, whatever the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


Numbers = NDArray[Any]
# One pass: arrays side by side, one per ranking, each a piece of that ranking's numbers.
Pass = Callable[[], Iterable[Sequence[Numbers]]]

_DIGIT_BITS = 16
# Up to here partitioning beats another bracket.
FEW = 1 << 12
# Standard errors around a sampled quantile: four miss once in some ten thousand rankings.
_MARGIN = 4.0


class Rank(NamedTuple):
    """A k-th largest number.

    Args:
        value (`float`): the number.
        places (`int`): how many numbers equal to it are among the k largest.
        equal (`list[int]`): how many numbers are equal to it in each piece of a pass.
    """

    value: float
    places: int
    equal: list[int]


def sample_step(total: int) -> int:
    """
    Distance between the samples of `total` numbers: about the cube root.

    The sample and the entries gathered around the quantile then both have about `total ** (2 / 3)` numbers. The step
    is odd, so that it does not meet the same few columns of a matrix again and again.
    """
    return max(1, round(total ** (1 / 3))) | 1


def kth_largest(samples: Sequence[Numbers], numbers: Pass, total: int, ks: Sequence[int]) -> list[Rank]:
    """
    Exact k-th largest numbers of one or several rankings.

    A sample brackets each of them; one pass counts what lies outside of the bracket and gathers what lies inside. If
    a bracket misses, which takes numbers that the sample does not represent, histograms of bit patterns decide.

    Args:
        samples (`Sequence[np.ndarray]`):
            One sample per ranking, of any size and of the type of its numbers; only the speed depends on it.
        numbers (`Callable`):
            Called once per pass; yields, piece by piece, one array per ranking, float32 or float64 without NaN.
        total (`int`):
            How many numbers each ranking has.
        ks (`Sequence[int]`):
            One rank per ranking, from 1 (the largest) to `total`.

    Returns:
        `list[Rank]`: one per ranking.
    """
    brackets = [_Bracket(*_bounds(sample, total, k)) for sample, k in zip(samples, ks, strict=True)]
    for pieces in numbers():
        for bracket, piece in zip(brackets, pieces, strict=True):
            bracket.add(piece)
    ranks = []
    for index, (bracket, k) in enumerate(zip(brackets, ks, strict=True)):
        found = bracket.find(k)
        if found is None:
            found = kth_by_histogram(_column(numbers, index), k, samples[index].dtype)
        ranks.append(found)
    return ranks


def count(mask: Numbers) -> int:
    """How many entries of a boolean array are true."""
    return int(np.count_nonzero(mask))


def _column(numbers: Pass, index: int) -> Callable[[], Iterable[Numbers]]:
    return lambda: (pieces[index] for pieces in numbers())


def _bounds(sample: Numbers, total: int, k: int) -> tuple[float, float]:
    """Numbers between which the k-th largest lies almost surely."""
    share, size = k / total, sample.size
    margin = _MARGIN * (math.sqrt(size * share * (1 - share)) + 1)
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    ranked = np.sort(sample)[::-1]
    return (
        float(ranked[last]) if last < size else -math.inf,
        float(ranked[first]) if first >= 0 else math.inf,
    )


class _Bracket:
    """Counts at both ends of an interval, and the numbers strictly inside; many equal numbers are only counted."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.above_high = self.from_high = self.above_low = self.from_low = 0
        self.at_high: list[int] = []
        self.at_low: list[int] = []
        self.inside: list[Numbers] = []

    def add(self, piece: Numbers) -> None:
        above_low, from_high = piece > self.low, piece >= self.high
        low, high = count(above_low), count(from_high)
        # Where many numbers are equal, both ends often are the same one.
        same = self.low == self.high
        counts = (low, high, low, high) if same else (count(piece > self.high), high, low, count(piece >= self.low))
        self.above_high += counts[0]
        self.from_high += counts[1]
        self.above_low += counts[2]
        self.from_low += counts[3]
        self.at_high.append(counts[1] - counts[0])
        self.at_low.append(counts[3] - counts[2])
        # An empty slice would keep the whole piece in memory.
        some = counts[2] > counts[1]
        self.inside.append(piece[above_low != from_high] if some else np.empty(0, dtype=piece.dtype))

    def find(self, k: int) -> Rank | None:
        """The k-th largest number, unless it lies outside."""
        if not self.above_high < k <= self.from_low:
            return None
        if k <= self.from_high:
            return Rank(self.high, k - self.above_high, self.at_high)
        if k > self.above_low:
            return Rank(self.low, k - self.above_low, self.at_low)
        inside = np.concatenate(self.inside)
        value, places, _ = _kth_in_memory(inside, k - self.from_high)
        return Rank(value, places, [count(piece == value) for piece in self.inside])


def _kth_in_memory(numbers: Numbers, k: int) -> Rank:
    if numbers.size > FEW:
        sample = numbers[:: sample_step(numbers.size)]
        return kth_largest([sample], lambda: [[numbers]], numbers.size, [k])[0]
    value = np.partition(numbers, numbers.size - k)[numbers.size - k]
    return Rank(float(value), k - count(numbers > value), [count(numbers == value)])


def kth_by_histogram(numbers: Callable[[], Iterable[Numbers]], k: int, dtype: np.dtype[Any]) -> Rank:
    """
    Exact k-th largest number in constant memory.

    Floats are ordered like their bit patterns, once those of negative numbers are turned round, so that the number is
    found 16 bits at a time from histograms: two passes for float32, four for float64. Every pass after the first
    looks only at the numbers that share the bits found so far.
    """
    width = 8 * dtype.itemsize
    prefix, remaining = 0, k
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, dtype=np.int64)
        for piece in numbers():
            pattern = _ordered_bits(piece)
            if shift + _DIGIT_BITS < width:
                pattern = pattern[pattern >> (shift + _DIGIT_BITS) == prefix]
            counts += np.bincount((pattern >> shift).astype(np.uint16), minlength=counts.size)
        at_least = np.cumsum(counts[::-1])
        position = int(np.searchsorted(at_least, remaining))
        if position == counts.size:
            raise ValueError(f"Asked for number {k} of only {int(at_least[-1])}.")
        digit = counts.size - 1 - position
        remaining -= int(at_least[position] - counts[digit])
        prefix = (prefix << _DIGIT_BITS) | digit
    value = _from_ordered_bits(prefix, dtype)
    return Rank(value, remaining, [count(piece == value) for piece in numbers()])


def _ordered_bits(piece: Numbers) -> Numbers:
    """Unsigned integers in the order of the numbers."""
    # Adding zero turns minus zero into zero.
    bits = (piece + piece.dtype.type(0)).view(f"u{piece.itemsize}")
    sign = bits.dtype.type(1 << (8 * piece.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _from_ordered_bits(pattern: int, dtype: np.dtype[Any]) -> float:
    width = 8 * dtype.itemsize
    sign = 1 << (width - 1)
    bits = pattern ^ sign if pattern & sign else ~pattern & ((1 << width) - 1)
    return float(np.array(bits, dtype=f"u{dtype.itemsize}").view(dtype))
