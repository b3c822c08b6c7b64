"""Singular vectors of weight matrices through their Gram matrices, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import lapack


Triplets = tuple[Tensor, Tensor, Tensor]

# Weaker directions than this are taken from what the stronger ones leave: squaring has cost them digits, and the
# rounding of products with the stronger ones would bury them.
_WEAK = 1 / 32

# Below this ratio of singular values, rounding mixes the vectors with those of still weaker ones.
_MIXED = 1e-4

# From this size on, SciPy's LAPACK, which can leave eigenvectors out, is faster than torch's solver of all of them; that
# one gains most from wide registers.
_LARGE = 256 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 2048

_EPS = torch.finfo(torch.float32).eps
_FAILURES = (torch.linalg.LinAlgError, lapack.LinAlgError)


def thin_svd(matrix: Tensor, max_rank: int | None = None) -> Triplets:
    """
    Leading singular triplets up to the numerical rank, from an eigendecomposition of the Gram matrix.

    The Gram matrix of the short side is formed and diagonalised in float64, which is two to eight times faster than an
    SVD. Singular values are read off the projected columns, not off the eigenvalues, which have lost half their digits;
    weak directions come from a second Gram matrix, that of what the strong ones leave. Where the eigenvalues do not
    converge, an SVD is computed instead.

    Args:
        matrix (`Tensor`):
            Shape `(m, n)`, floating point.
        max_rank (`int`, *optional*):
            At most this many triplets; fewer take less time.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: U `(m, k)`, S `(k,)` descending, V `(n, k)`, float64. Singular values up to
        `max(m, n) * eps_float32` times the largest count as zero; k is 0 for a zero matrix.
    """
    matrix = matrix.detach().to(torch.float64)
    limit = min(matrix.shape) if max_rank is None else min(max_rank, *matrix.shape)
    if limit == 0 or not bool(matrix.any()):
        return _nothing(matrix)
    is_tall = matrix.shape[0] >= matrix.shape[1]
    tall = matrix if is_tall else matrix.T
    cutoff = rank_cutoff(matrix)
    try:
        left, values, right = _leading(tall, limit, cutoff) or _peel(tall, cutoff)
    except _FAILURES:
        left, values, right = _svd(tall, cutoff)
    left, values, right = left[:, :limit], values[:limit], right[:, :limit]
    return (left, values, right) if is_tall else (right, values, left)


def polar_factor(matrix: Tensor, dtype: torch.dtype = torch.float64, cutoff: float | None = None) -> Tensor:
    """
    Nearest matrix with orthonormal rows or columns: `P @ Q.T` for `matrix = P @ diag(s) @ Q.T`.

    Args:
        matrix (`Tensor`):
            Shape `(m, n)`, floating point. Directions beyond the numerical rank are left out, so a rank-deficient
            matrix gives a partial isometry, and a zero matrix gives zero.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            Type of the result. The decomposition itself is computed in float64.
        cutoff (`float`, *optional*):
            Singular values up to so many times the largest count as zero. Defaults to `max(m, n) * eps_float32`; below
            1e-7 only 0 makes a difference: null directions, arbitrary as they are, then take part.

    Returns:
        `Tensor`: shape `(m, n)`.
    """
    return reshape_spectrum(matrix, torch.ones_like, dtype, cutoff)


def reshape_spectrum(
    matrix: Tensor,
    shape: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float64,
    cutoff: float | None = None,
) -> Tensor:
    """
    A matrix with other singular values: `P @ diag(shape(s)) @ Q.T` for `matrix = P @ diag(s) @ Q.T`.

    With `s'` for `shape(s)` this is `matrix @ (Q @ diag(s' / s) @ Q.T)`: strong left vectors are never formed.

    Args:
        matrix (`Tensor`):
            Shape `(m, n)`, floating point.
        shape (`Callable`):
            Maps the k singular values above the numerical rank, float64 in any order, to k non-negative ones.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            Type of the result and of the products that form it; the decomposition is computed in float64.
        cutoff (`float`, *optional*):
            Singular values up to so many times the largest count as zero, see [`polar_factor`].

    Returns:
        `Tensor`: shape `(m, n)`, zero for a zero matrix.
    """
    matrix = matrix.detach()
    if not bool(matrix.any()):
        return torch.zeros_like(matrix, dtype=dtype)
    is_tall = matrix.shape[0] >= matrix.shape[1]
    tall = (matrix if is_tall else matrix.T).to(torch.float64)
    strong, vectors, weak = _spectrum(tall, rank_cutoff(matrix) if cutoff is None else cutoff)
    reshaped = shape(torch.cat([strong, weak[1]]))
    factors = vectors.to(dtype) * (reshaped[: len(strong)] / strong).sqrt().to(dtype)
    metric = gram_matrix(factors.T)
    left, right = (weak[0] * reshaped[len(strong) :]).to(dtype), weak[2].to(dtype)
    if is_tall:
        return torch.addmm(left @ right.T, matrix.to(dtype), metric)
    return torch.addmm(right @ left.T, metric, matrix.to(dtype))


def rank_cutoff(matrix: Tensor) -> float:
    """The singular value, relative to the largest, up to which those of a matrix of float32 entries may be rounding."""
    return max(matrix.shape) * _EPS


def gram_matrix(tall: Tensor) -> Tensor:
    """`tall.T @ tall`, at half the cost on the CPU, where NumPy sees that the product is symmetric."""
    if tall.device.type != "cpu":
        return tall.T @ tall
    array = tall.numpy()
    return torch.from_numpy(array.T @ array)


def leading_eigh(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of a symmetric float64 matrix, ascending, and their vectors as columns."""
    if gram.device.type == "cpu" and len(gram) >= _LARGE and lapack.is_available():
        values, vectors = lapack.leading_eigh(gram.numpy(), count)
        return torch.from_numpy(values), torch.from_numpy(vectors)
    values, vectors = torch.linalg.eigh(gram)
    return values[-count:], vectors[:, -count:]


def _leading(tall: Tensor, count: int, cutoff: float) -> Triplets | None:
    """Up to `count` leading triplets, computed without the others; `None` if that is no less, or not accurate."""
    if count == tall.shape[1]:
        return None
    values, vectors = _gram_spectrum(tall, count)
    kept = values > cutoff * values[-1]
    if not bool(kept.any()) or bool((values[kept] < _MIXED * values[-1]).any()):
        return None
    return _triplets(tall, vectors[:, kept])


def _peel(tall: Tensor, cutoff: float, scale: float = 0.0) -> Triplets:
    """All triplets above `cutoff * scale`, strongest first; the scale is by default the largest singular value."""
    _, vectors, weak = _split(tall, cutoff, scale)
    strong = _triplets(tall, vectors)
    return (torch.cat([strong[0], weak[0]], 1), torch.cat([strong[1], weak[1]]), torch.cat([strong[2], weak[2]], 1))


def _split(tall: Tensor, cutoff: float, scale: float = 0.0) -> tuple[Tensor, Tensor, Triplets]:
    """Strong singular values, ascending, and their right vectors; the triplets of the weaker ones above the cutoff."""
    values, vectors = _gram_spectrum(tall, tall.shape[1])
    largest = float(values[-1])
    scale = scale or largest
    start = int((values <= cutoff * scale).sum()) if cutoff * scale > _MIXED * largest else 0
    middle = max(start, int((values <= _WEAK * largest).sum()))
    weak = vectors[:, start:middle]
    rest = tall @ weak
    # The Gram matrix of near zero columns is rounding; the columns themselves tell whether anything is there.
    if float(torch.linalg.vector_norm(rest)) <= cutoff * scale:
        return values[middle:], vectors[:, middle:], _nothing(tall)
    left, weak_values, inner = _peel(rest, cutoff, scale)
    return values[middle:], vectors[:, middle:], (left, weak_values, weak @ inner)


def _spectrum(tall: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Triplets]:
    """As `_split`, with everything counted as weak where only an SVD gives the directions asked for."""
    try:
        strong, vectors, weak = _split(tall, max(cutoff, _EPS))
        if cutoff > 0 or len(strong) + len(weak[1]) == tall.shape[1]:
            return strong, vectors, weak
    except _FAILURES:
        pass
    return tall.new_zeros(0), tall.new_zeros(tall.shape[1], 0), _svd(tall, cutoff)


def _gram_spectrum(tall: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values, ascending, as far as the Gram matrix tells them, and their right vectors."""
    eigenvalues, vectors = leading_eigh(gram_matrix(tall), count)
    return eigenvalues.clamp(min=0).sqrt(), vectors


def _triplets(tall: Tensor, ascending: Tensor) -> Triplets:
    """Triplets that belong to right vectors, strongest first."""
    right = ascending.flip(1)
    left = tall @ right
    values = torch.linalg.vector_norm(left, dim=0)
    return left / values, values, right


def _nothing(matrix: Tensor) -> Triplets:
    rows, columns = matrix.shape
    return matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(columns, 0)


def _svd(matrix: Tensor, cutoff: float) -> Triplets:
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        # The accelerator's solver may give up where LAPACK does not.
        left, values, right = (part.to(matrix.device) for part in torch.linalg.svd(matrix.cpu(), full_matrices=False))
    rank = int((values > cutoff * values[0]).sum()) if cutoff > 0 else len(values)
    return left[:, :rank], values[:rank], right[:rank].T
