"""How tasks share the singular directions of one weight matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..merging.spectral.decompositions import Triplets, thin_svd


def singular_task_interference(factors: Sequence[Triplets]) -> float:
    """
    Singular task interference, STI (https://huggingface.co/papers/2412.00081, eq. 5).

    The L1 norm of `(U'U - I) S (V'V - I)` over the singular vectors of all tasks side by side: zero when the left or
    the right ones of different tasks are orthogonal, and in units of the weights.

    Args:
        factors (`Sequence[Triplets]`):
            Of T tasks, `(U, S, V)` with shapes `(m, k)`, `(k,)` and `(n, k)`; the paper takes `k = min(m, n) / T`.

    Returns:
        `float`: at least 0.
    """
    left, right = (torch.cat([triplets[side].double() for triplets in factors], dim=1) for side in (0, 2))
    values = torch.cat([triplets[1].double() for triplets in factors])
    overlaps = [side.T @ side for side in (left, right)]
    for overlap in overlaps:
        overlap.diagonal().sub_(1)
    return float(((overlaps[0] * values) @ overlaps[1]).abs().sum())


def leading_factors(matrices: Sequence[Tensor]) -> list[Triplets]:
    """The share of each task's singular triplets that fits into the matrix beside those of the others: `min(m, n) / T`."""
    rank = max(1, min(matrices[0].shape) // len(matrices))
    return [thin_svd(matrix, rank) for matrix in matrices]


def dominant_basis(merged: Triplets, residual: float = 0.05) -> Tensor:
    """
    Left singular vectors that hold a matrix up to a residual.

    Args:
        merged (`Triplets`):
            All triplets of the merged update.
        residual (`float`, *optional*, defaults to 0.05):
            Frobenius norm that may be left, relative to the whole.

    Returns:
        `Tensor`: `(m, k)` with the smallest k that does, float64; `(m, 0)` for a zero matrix.
    """
    left, values, _ = merged
    squares = values.double().square()
    # Behind the i-th value lies the energy of all after it.
    behind = squares.sum() - squares.cumsum(0)
    count = int((behind > residual**2 * squares.sum()).sum()) + 1 if len(values) else 0
    return left.double()[:, :count]


def subspace_alignment(matrices: Sequence[Tensor], basis: Tensor) -> list[float]:
    """
    Share of each task matrix's Frobenius norm that lies in a subspace (https://huggingface.co/papers/2502.04959).

    Args:
        matrices (`Sequence[Tensor]`):
            T matrices `(m, n)`.
        basis (`Tensor`):
            `(m, k)` with orthonormal columns, from [`dominant_basis`].

    Returns:
        `list[float]`: T numbers in [0, 1]; 0 for a zero matrix.
    """
    shares = []
    for matrix in matrices:
        matrix = matrix.to(basis)
        norm = float(torch.linalg.matrix_norm(matrix))
        shares.append(min(1.0, float(torch.linalg.matrix_norm(basis.T @ matrix)) / norm) if norm else 0.0)
    return shares


def effective_rank(singular_values: Tensor) -> float:
    """
    Effective rank: the exponential of the entropy of the squared singular values, as shares of their sum.

    Args:
        singular_values (`Tensor`):
            `(k,)`, non-negative.

    Returns:
        `float`: from 1 (one direction holds everything) to k (all hold the same); 0 for a zero matrix.
    """
    squares = singular_values.double().square()
    total = float(squares.sum())
    if not total:
        return 0.0
    shares = squares[squares > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))
