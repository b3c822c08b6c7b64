"""Matrices of low rank: kept as two factors, measured and cut without ever being multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# Options of LoraConfig under which a layer does more than add s B A to its weight.
INEXACT_OPTIONS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)

# Singular values below this share of the largest are the rounding of float32 factors.
RANK_TOLERANCE = 1e-6


def numerical_rank(values: Tensor) -> int:
    """How many of the descending singular values rise above the rounding of float32 factors."""
    return int((values > RANK_TOLERANCE * values[:1]).sum())


def leading_triplets(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Leading singular triplets with signs that do not depend on the solver.

    Args:
        matrix (`Tensor`): shape `(m, n)`.
        rank (`int`, *optional*): how many; all `min(m, n)` by default.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: U `(m, rank)`, S `(rank,)` descending, V `(n, rank)`, float64; every column of
        U has a positive entry of largest magnitude.
    """
    left, values, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    signs = column_signs(left)
    return (left * signs)[:, :rank], values[:rank], (right.T * signs)[:, :rank]


def column_signs(matrix: Tensor) -> Tensor:
    """Factors of plus or minus one, shape `(columns,)`, that make each column's entry of largest magnitude positive."""
    if matrix.numel() == 0:
        return matrix.new_ones(matrix.shape[1])
    least, largest = torch.aminmax(matrix, dim=0)
    return torch.where(-least > largest, -1.0, 1.0).to(matrix)


@dataclass(frozen=True)
class LowRank:
    """The matrix `left @ right`.

    Args:
        left (`Tensor`): shape `(m, k)`, float64.
        right (`Tensor`): shape `(k, n)`, float64.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number k of columns and rows that are multiplied; an upper bound on the matrix's rank."""
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, shape `(m, n)`."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm, by triangular factors: no cancellation and no `(m, n)` workspace."""
        rows = torch.linalg.qr(self.left, mode="r").R
        columns = torch.linalg.qr(self.right.T, mode="r").R
        return float(torch.linalg.matrix_norm(rows @ columns.T))

    def scaled(self, factor: float) -> LowRank:
        return self if factor == 1.0 else LowRank(self.left * factor, self.right)

    def cut(self, rank: int | None = None) -> tuple[LowRank, Tensor]:
        """
        Best approximation of a rank: `left = Q_l R_l`, `right.T = Q_r R_r`, one SVD of the small `R_l R_r.T`.

        Args:
            rank (`int`, *optional*): rank of the result; by default the numerical rank, at least one.

        Returns:
            `tuple[LowRank, Tensor]`: balanced factors `Q_l U sqrt(S)` and `sqrt(S) V.T Q_r.T`, and all singular values.
        """
        outer, rows = torch.linalg.qr(self.left)
        inner, columns = torch.linalg.qr(self.right.T)
        small, values = Dense(rows @ columns.T).cut(rank)
        return lifted(outer, small, inner), values


@dataclass(frozen=True)
class Dense:
    """A matrix that is not known to have a low rank, with the interface of [`LowRank`].

    Args:
        matrix (`Tensor`): shape `(m, n)`, floating point.
    """

    matrix: Tensor

    @property
    def rank(self) -> int:
        return min(self.matrix.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        return self.matrix.double()

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.matrix, dtype=torch.float64))

    def scaled(self, factor: float) -> Dense:
        return self if factor == 1.0 else Dense((self.matrix.double() * factor).to(self.matrix.dtype))

    def cut(self, rank: int | None = None) -> tuple[LowRank, Tensor]:
        left, values, right = leading_triplets(self.matrix)
        kept = max(1, numerical_rank(values)) if rank is None else rank
        return balanced(left[:, :kept], values[:kept], right[:, :kept]), values


Update = LowRank | Dense


def zero_update(shape: tuple[int, int]) -> LowRank:
    """No update at all; of rank one, because a layer of PEFT has at least that."""
    return LowRank(torch.zeros(shape[0], 1, dtype=torch.float64), torch.zeros(1, shape[1], dtype=torch.float64))


def stacked(terms: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """The exact weighted sum of low-rank matrices: their factors side by side, coefficients in the left ones."""
    left = torch.cat([term.left * factor for term, factor in zip(terms, coefficients, strict=True)], dim=1)
    return LowRank(left, torch.cat([term.right for term in terms]))


def balanced(left: Tensor, values: Tensor, right: Tensor) -> LowRank:
    """Factors of `left @ diag(values) @ right.T` that share the singular values evenly."""
    root = values.sqrt()
    return LowRank(left * root, root[:, None] * right.T)


def lifted(left: Tensor, factors: LowRank, right: Tensor) -> LowRank:
    """The matrix `left @ factors @ right.T` for orthonormal bases, the signs of its factors fixed again."""
    outer = left @ factors.left
    signs = column_signs(outer)
    return LowRank(outer * signs, (signs[:, None] * factors.right) @ right.T)
