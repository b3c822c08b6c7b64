"""Small coordinates for low-rank updates: core space, and the aligned parts of KnOTS inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import RANK_TOLERANCE, Dense, LowRank, column_signs, lifted, numerical_rank


@dataclass(frozen=True)
class CoreSpace:
    """Orthonormal bases that hold the updates of one module in all tasks, and the updates in them.

    With `U` the left singular vectors of `[D_1 ... D_T]` and `V` the right singular vectors of `[D_1; ...; D_T]`, down to
    the numerical rank, `D_t = U M_t V.T` loses nothing, and the cores `M_t = U.T D_t V` have at most as many rows and
    columns as the adapters have ranks together (Core Space, https://huggingface.co/papers/2509.17786). Deviation: the
    paper takes the singular vectors of the stacked factors, which change with (A, B) -> (G A, B G^-1); these are
    functions of the updates alone, up to signs, which are fixed, and up to equal singular values.

    Args:
        left (`Tensor`): U, shape `(m, p)`, float64.
        right (`Tensor`): V, shape `(n, q)`, float64.
        parts (`list[Tensor]`): T cores `(p, q)`; or larger, with zeros beyond, see [`core_space`].
    """

    left: Tensor
    right: Tensor
    parts: list[Tensor]

    def lift(self, core: Tensor) -> LowRank:
        """The update `U core V.T`, as balanced factors of its numerical rank.

        Raises:
            ValueError: if the core has entries beyond the bases.
        """
        p, q = self.left.shape[1], self.right.shape[1]
        inside = core[:p, :q].double()
        outside = float(core.double().norm() ** 2 - inside.norm() ** 2)
        if outside > 1e-9 * float(core.double().norm() ** 2):
            raise ValueError(
                "The method puts energy outside the span of the updates, where core space has no directions; pass "
                "space='full'."
            )
        return lifted(self.left, Dense(inside).cut()[0], self.right)


@dataclass(frozen=True)
class KnotsSpace:
    """The updates of one module aligned by one SVD, `[D_1 ... D_T] = U S [V_1.T ... V_T.T]`.

    A rule sees the parts `V_t.T`, shape `(p, n)`; what it makes of them is lifted by `U S`
    (KnOTS, https://huggingface.co/papers/2410.19735). In core space the rows of `[M_1 ... M_T]` are orthogonal with norms
    S, so that `V_t.T = S^-1 M_t V.T` needs no other decomposition.

    Args:
        lifting (`Tensor`): `U S`, shape `(m, p)`, float64.
        parts (`list[Tensor]`): T tensors `(p, n)`, float64.
    """

    lifting: Tensor
    parts: list[Tensor]

    def lift(self, part: Tensor) -> LowRank:
        """The update `U S part`."""
        return LowRank(self.lifting, part.double())


def core_space(updates: Sequence[LowRank], pad: bool = False, any_basis: bool = False) -> CoreSpace:
    """
    Finds the core space of one module.

    Args:
        updates (`Sequence[LowRank]`): T updates of one shape, not all zero.
        pad (`bool`, *optional*, defaults to `False`): whether to bring the cores, with zeros, up to T times the largest
            rank of a task (but not beyond the module's shape). Methods that give each task a share of a matrix's
            directions then see as many as in full space, even where the tasks share factors or differ in rank.
        any_basis (`bool`, *optional*, defaults to `False`): whether any orthonormal bases of the two spans do, as they
            do for methods to which entries mean nothing. Where the factors are of full rank, two thirds of the time
            are saved.

    Returns:
        `CoreSpace`: bases and cores.

    Cost: two QR decompositions of `(m, R)` and `(n, R)` and two SVDs of `(R, T R)`, R the sum of the ranks.
    """
    outer, rows = torch.linalg.qr(torch.cat([update.left for update in updates], dim=1))
    inner, columns = torch.linalg.qr(torch.cat([update.right for update in updates]).T)
    ranks = [update.rank for update in updates]
    small = [row @ column.T for row, column in zip(rows.split(ranks, 1), columns.split(ranks, 1), strict=True)]
    if (
        any_basis
        and len(set(ranks)) == 1
        and all(_is_full(core) for core in (torch.cat(small, 1), torch.cat(small).T))
    ):
        return CoreSpace(outer, inner, small)
    left, turned = _rotated(outer, _range(torch.cat(small, dim=1)))
    right, mirrored = _rotated(inner, _range(torch.cat([core.T for core in small], dim=1)))
    cores = [turned.T @ core @ mirrored for core in small]
    if pad:
        largest = max(numerical_rank(torch.linalg.svdvals(core)) for core in cores)
        m, n = updates[0].shape
        cores = [_padded(core, min(m, len(cores) * largest), min(n, len(cores) * largest)) for core in cores]
    return CoreSpace(left, right, cores)


def knots_space(updates: Sequence[LowRank]) -> KnotsSpace:
    """
    Aligns the updates of one module.

    Args:
        updates (`Sequence[LowRank]`): T updates of one shape, not all zero.

    Returns:
        `KnotsSpace`: lifting and parts.

    Cost: that of [`core_space`], and T times `(p, n)` entries.
    """
    core = core_space(updates)
    values = torch.cat(core.parts, dim=1).norm(dim=1)
    parts = [(part / values[:, None]) @ core.right.T for part in core.parts]
    return KnotsSpace(core.left * values, parts)


def _is_full(matrix: Tensor) -> bool:
    """Whether the rows of a wide matrix are independent, beyond all doubt that squaring them may cast on it."""
    squares = torch.linalg.eigvalsh(matrix @ matrix.T)
    return bool(squares[0] > 100 * RANK_TOLERANCE**2 * squares[-1])


def _range(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the columns' span: left singular vectors down to the numerical rank."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, : numerical_rank(values)]


def _rotated(basis: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated basis and the rotation, the signs of both fixed."""
    rotated = basis @ rotation
    signs = column_signs(rotated)
    return rotated * signs, rotation * signs


def _padded(core: Tensor, rows: int, columns: int) -> Tensor:
    padded = core.new_zeros(max(rows, core.shape[0]), max(columns, core.shape[1]))
    padded[: core.shape[0], : core.shape[1]] = core
    return padded
