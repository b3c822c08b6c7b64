"""What a merge costs: work per part, to share it out, and memory, to know before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import PIECE, Merger


def step_cost(merger: Merger, part: Sequence[str]) -> float:
    """Relative work of one part: entries read, and the cube of the short side where matrices are decomposed."""
    cost = 0.0
    for key in part:
        shape = merger.views[0].shape(key)
        entries = float(shape.numel())
        cost += entries * (len(merger.models) + 1)
        if merger.rule.family in ("spectral", "gram") and len(shape) == 2:
            cost += entries * min(shape)
    return cost


def workspace(merger: Merger, part: Sequence[str]) -> int:
    """
    Estimated bytes that merging one part takes beside what is mapped from files.

    Plain sums hold a piece or two; elementwise methods the merged tensor and pieces of all tasks; geometric ones all
    task vectors; spectral and Gram methods float64 factors and squares of the short or the inner side.
    """
    pieces = PIECE * 8 * (len(merger.models) + 4)
    if merger.fused and not merger.needs_norms:
        return PIECE * 8 * 4
    total = pieces
    count = len(merger.models)
    for key in part:
        shape = merger.views[0].shape(key)
        entries, width = shape.numel(), merger.plan.dtypes[key].itemsize
        total += entries * width
        if merger.rule.family == "linear":
            total += entries * 8
        elif merger.rule.family == "geometric":
            total += entries * width * (count + 1)
        elif merger.rule.family in ("spectral", "gram") and len(shape) == 2:
            short, inner = min(shape), shape[1]
            square = short if merger.rule.family == "spectral" else inner
            total += 8 * (3 * entries + 4 * square * square + sum(shape) * short)
        elif not merger.rule.per_tensor:
            total += entries * width * (count + 1)
    return total


def peak_memory(merger: Merger, threads: int) -> int:
    """
    Estimated peak of memory that is not backed by files, in bytes, beside what the process holds already.

    The dearest parts may meet: one per thread.
    """
    largest = sorted((workspace(merger, part) for part in merger.parts), reverse=True)
    return sum(largest[:threads])
