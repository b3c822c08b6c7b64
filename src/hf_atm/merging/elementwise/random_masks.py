"""Entries dropped at random, reproducibly: DARE's even masks and DELLA's masks by rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..tensors import Task
from .chunks import Drop


_LANE_BITS = 32


class RandomLanes:
    """
    Random 32-bit numbers for the entries of one tensor of one task, drawn in the order of the entries.

    The bit generator is keyed by SHA-256 of (seed, tensor name, task name), so that the numbers are the same in every
    process, on every device and under every NumPy version, and differ between tensors and tasks.
    """

    def __init__(self, seed: int, key: str, task: str) -> None:
        digest = hashlib.sha256(json.dumps([int(seed), key, task]).encode()).digest()
        self._generator = np.random.SFC64(int.from_bytes(digest, "big"))

    def draw(self, count: int) -> NDArray[np.uint32]:
        """The next `count` numbers; all calls but the last should ask for an even number, or one is lost."""
        return self._generator.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]


def lane_limits(probabilities: float | NDArray[np.float64]) -> NDArray[np.uint32]:
    """The largest numbers that keep an entry, so that about the given share of all numbers does."""
    counts = np.rint(np.asarray(probabilities, dtype=np.float64) * 2**_LANE_BITS)
    return np.asarray(np.clip(counts, 1, 2**_LANE_BITS) - 1).astype(np.uint32)


def kept_shares(limits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The exact probabilities with which limits keep an entry."""
    return (limits.astype(np.float64) + 1) / 2**_LANE_BITS


def random_drop(tasks: Sequence[Task], key: str, density: float, seed: int) -> Drop:
    """`drop(key, start, chunks)`: sets entries of one tensor to zero, each kept with probability `density`."""
    limit = lane_limits(density)
    if kept_shares(limit) == 1:
        return lambda key, start, chunks: chunks
    streams = [RandomLanes(seed, key, task.name) for task in tasks]

    def drop(key: str, start: int, chunks: list[Tensor]) -> list[Tensor]:
        return [
            chunk * _as_tensor(stream.draw(chunk.numel()) <= limit, chunk)
            for stream, chunk in zip(streams, chunks, strict=True)
        ]

    return drop


def row_length(shape: torch.Size) -> int:
    """Entries per row of a tensor; one of a single dimension is one row."""
    return shape.numel() // shape[0] if len(shape) > 1 else shape.numel()


def ranked_drop(
    tasks: Sequence[Task], key: str, density: float, epsilon: float, seed: int, rescale: bool = True
) -> Drop:
    """
    `drop(key, start, chunks)`: drops by rank within rows, as [`della`] describes; chunks must be whole rows.

    The kept entries are divided, in float64, by the probability with which they are kept, if `rescale`.
    """
    length = row_length(tasks[0].shape(key))
    ramp = np.linspace(-epsilon, epsilon, length) if length > 1 else np.zeros(1)
    limits = lane_limits(density + ramp)
    factors = 1 / kept_shares(limits) if rescale else np.ones(length)
    streams = [RandomLanes(seed, key, task.name) for task in tasks]

    def drop(key: str, start: int, chunks: list[Tensor]) -> list[Tensor]:
        return [
            chunk.double() * torch.from_numpy(_row_factors(chunk, stream, limits, factors)).to(chunk.device)
            for stream, chunk in zip(streams, chunks, strict=True)
        ]

    return drop


def _row_factors(
    chunk: Tensor, stream: RandomLanes, limits: NDArray[np.uint32], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The factor of every entry: zero, or that of its rank."""
    magnitudes = np.abs(chunk.float().cpu().numpy()).view(np.uint32)
    # Magnitude above, index below: all keys differ, so that one fast unstable sort ranks stably.
    ranked = magnitudes.astype(np.uint64) << np.uint64(32)
    ranked |= np.arange(ranked.size, dtype=np.uint64)
    ranked = ranked.reshape(-1, limits.size)
    ranked.sort(axis=1)
    kept = stream.draw(ranked.size).reshape(ranked.shape) <= limits
    result = np.empty(ranked.size)
    result[(ranked & np.uint64(0xFFFFFFFF)).view(np.int64)] = kept * factors
    return result


def _as_tensor(mask: NDArray[Any], like: Tensor) -> Tensor:
    # Booleans convert eight times as slowly.
    return torch.from_numpy(mask.view(np.int8)).to(like.device, like.dtype)
