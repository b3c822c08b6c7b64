"""Where tasks pull the same weight in different directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merging.elementwise.trimming import find_cuts, kept_count
from ..merging.tensors import CHUNK, Task


@dataclass(frozen=True)
class SignCounts:
    """Entries of a tensor, by what the tasks hold there among their largest.

    Args:
        entries (`int`): all entries.
        shared (`int`): entries that at least two tasks hold.
        conflicting (`int`): entries that two tasks hold with different signs.
    """

    entries: int = 0
    shared: int = 0
    conflicting: int = 0

    def __add__(self, other: SignCounts) -> SignCounts:
        return SignCounts(
            self.entries + other.entries, self.shared + other.shared, self.conflicting + other.conflicting
        )

    @property
    def overlap(self) -> float:
        """Share of entries that at least two tasks hold, in [0, 1]."""
        return self.shared / self.entries if self.entries else 0.0

    @property
    def conflict(self) -> float:
        """Share of entries that tasks hold with different signs, in [0, 1]."""
        return self.conflicting / self.entries if self.entries else 0.0


def count_signs(tensors: Sequence[Tensor], density: float = 0.2) -> SignCounts:
    """
    Counts where the largest entries of T tensors meet, and where their signs differ.

    Args:
        tensors (`Sequence[Tensor]`):
            T tensors of one shape, floating point.
        density (`float`, *optional*, defaults to 0.2):
            Share of each tensor's entries that counts as its largest; zeros never do.

    Returns:
        [`SignCounts`]
    """
    key, numel = "", tensors[0].numel()
    if not numel:
        return SignCounts()
    flats = [tensor.reshape(-1) for tensor in tensors]
    cuts = [find_cuts(Task(key, 1.0, {key: flat}), [key], [kept_count(density, numel)])[0] for flat in flats]
    shared = conflicting = 0
    for start in range(0, numel, CHUNK):
        pieces = [flat[start : start + CHUNK].float() for flat in flats]
        signs = torch.stack(
            [cut.apply(p, key, start).sign().to(torch.int8) for cut, p in zip(cuts, pieces, strict=True)]
        )
        held = signs.abs().sum(0)
        shared += int((held > 1).sum())
        conflicting += int((signs.sum(0).abs() < held).sum())
    return SignCounts(numel, shared, conflicting)
