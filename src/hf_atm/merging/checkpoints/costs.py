"""What a merge costs: work per part, to share it out, and memory, to know before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import Merger
from ..spectral.matrices import NON_MATRIX, is_matrix
from ..tensors import CHUNK


def step_cost(merger: Merger, part: Sequence[str]) -> float:
    """Relative work of one part: entries read, and the cube of the short side where matrices are decomposed."""
    cost = 0.0
    for key in part:
        shape = merger.views[0].shape(key)
        entries = float(shape.numel())
        cost += entries * (len(merger.models) + 1)
        if merger.decomposes and is_decomposed(merger, key):
            cost += entries * min(shape)
    return cost


def workspace(merger: Merger, part: Sequence[str]) -> int:
    """
    Estimated bytes that merging one part takes beside what is mapped from files.

    Plain sums hold a few pieces; elementwise and geometric methods the merged tensor and pieces of all tasks; spectral
    and Gram methods float64 factors, and squares of the inner side, which is rough: methods differ by a factor of two.
    """
    if merger.fused:
        return CHUNK * 8 * (len(merger.models) + 4 if merger.needs_norms else 4)
    total = CHUNK * 8 * (2 * len(merger.models) + 6)
    for key in part:
        shape = merger.views[0].shape(key)
        entries, width = shape.numel(), merger.plan.dtypes[key].itemsize
        total += entries * width
        if "majority_sign_method" in merger.rule.parameters:
            # Both outcomes of the votes that end in a draw; few in float32, one in ten in bfloat16.
            total += entries
        if not merger.rule.per_tensor:
            total += entries * width * (len(merger.models) + 1)
        elif merger.decomposes and is_decomposed(merger, key):
            if merger.rule.family == "gram":
                total += 8 * (4 * entries + 5 * shape[1] ** 2)
            else:
                total += 8 * 9 * entries
    return total


def is_decomposed(merger: Merger, key: str) -> bool:
    """Whether a tensor counts as a matrix for the method."""
    patterns = merger.kwargs.get("non_matrix", merger.rule.parameters.get("non_matrix", NON_MATRIX))
    return is_matrix(key, len(merger.views[0].shape(key)), patterns)


def peak_memory(merger: Merger, threads: int) -> int:
    """
    Estimated peak of memory that is not backed by files, in bytes, beside what the process holds already.

    The dearest parts may meet: one per thread.
    """
    largest = sorted((workspace(merger, part) for part in merger.parts), reverse=True)
    return sum(largest[:threads])
