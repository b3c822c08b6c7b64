"""Spectral merges of weight matrices: TSV-M and Iso-C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .linear import linear_coefficients
from .registry import register_merge_method
from .tensors import Task, canonical_tasks, result_dtype, sorted_keys, weighted_sum


# Rows of these tables are looked up or indexed, not multiplied: their singular vectors carry no meaning.
NON_MATRIX = (
    "*embed*",
    "*lm_head*",
    "*wte.*",
    "*wpe.*",
    "shared.weight",
    "*.shared.weight",
    "*position_bias*",
    "*relative_attention_bias*",
)

# Below this ratio of singular values the Gram matrix starts to lose directions, although float64.
_GRAM_RATIO = 1e-4


def thin_svd(matrix: Tensor, max_rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Leading singular triplets up to the numerical rank, from an eigendecomposition of the Gram matrix.

    The Gram matrix of the short side is formed and diagonalised in float64, which is two to four times faster than an
    SVD for rectangular matrices. Singular values are read off the projected columns, not off the eigenvalues, which
    have lost half their digits. Where that is not accurate enough, or does not converge, an SVD is computed instead.

    Args:
        matrix (`Tensor`):
            Shape `(m, n)`, floating point.
        max_rank (`int`, *optional*):
            At most this many triplets.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: U `(m, k)`, S `(k,)` descending, V `(n, k)`, float64. Singular values up to
        `max(m, n) * eps_float32` times the largest count as zero; k is 0 for a zero matrix.
    """
    matrix = matrix.detach().to(torch.float64)
    limit = min(matrix.shape) if max_rank is None else min(max_rank, *matrix.shape)
    tolerance = max(matrix.shape) * torch.finfo(torch.float32).eps
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if limit == 0 or not bool(matrix.any()):
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0), matrix.new_zeros(matrix.shape[1], 0)
    try:
        eigenvalues, vectors = torch.linalg.eigh(tall.T @ tall)
    except torch.linalg.LinAlgError:
        return _svd(matrix, limit, tolerance)
    estimate = eigenvalues.flip(0).clamp(min=0).sqrt()
    rank = min(limit, int((estimate > tolerance * estimate[0]).sum()))
    if rank == 0 or float(estimate[rank - 1]) < _GRAM_RATIO * float(estimate[0]):
        return _svd(matrix, limit, tolerance)
    right = vectors.flip(1)[:, :rank]
    left = tall @ right
    values = left.norm(dim=0)
    left = left / values
    return (left, values, right) if tall is matrix else (right, values, left)


def _svd(matrix: Tensor, limit: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        # The accelerator's solver may give up where LAPACK does not.
        left, values, right = (part.to(matrix.device) for part in torch.linalg.svd(matrix.cpu(), full_matrices=False))
    rank = min(limit, int((values > tolerance * values[0]).sum()))
    return left[:, :rank], values[:rank], right[:rank].T


def polar_factor(matrix: Tensor) -> Tensor:
    """
    Nearest matrix with orthonormal rows or columns: `P @ Q.T` for `matrix = P @ diag(s) @ Q.T`.

    Args:
        matrix (`Tensor`):
            Shape `(m, n)`, floating point. Directions beyond the numerical rank are left out, so a rank-deficient
            matrix gives a partial isometry, and a zero matrix gives zero.

    Returns:
        `Tensor`: shape `(m, n)`, float64.
    """
    left, _, right = thin_svd(matrix)
    return left @ right.T


@register_merge_method("tsv_m", family="spectral", per_tensor=True)
def tsv_m(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    non_matrix: Sequence[str] = NON_MATRIX,
) -> dict[str, Tensor]:
    """
    TSV-M: decorrelated leading singular vectors of all tasks (https://huggingface.co/papers/2412.00081).

    For an `(m, n)` weight with r = min(m, n), each task gives its `max(1, floor(r / T))` leading triplets; the
    stacked left and right vectors are replaced by their polar factors: `polar(U) @ diag(s) @ polar(V).T`, singular
    values neither changed nor averaged. Deviation: a task gives no more triplets than its numerical rank, because
    null vectors, arbitrary as they are, would enter the polar step. A single task is returned unchanged.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T factors on the matrices; not normalised. A task of weight zero takes no part and leaves its rank to the
            others.
        names (`Sequence[str]`):
            T different task names; they fix the order of stacking.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of 2-D tensors that take the mean, as all tensors that are not 2-D do. Defaults to
            embeddings, language-model heads and position biases.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: matrices like a *sum* (about
        T times the mean's), other tensors like a mean; inside ATM use an outer step between 1/T and 1.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: T + 2 decompositions of order r^3 per matrix; float64 workspace of about (m + n) r + m n entries.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    matrices, merged = _mean_of_others(tasks, non_matrix)
    for key in matrices:
        first = tasks[0].tensors[key]
        if len(tasks) == 1:
            merged[key] = weighted_sum([first], [tasks[0].weight])
            continue
        count = max(1, min(first.shape) // len(tasks))
        parts = [thin_svd(task.tensors[key].detach().double() * task.weight, count) for task in tasks]
        left, right = (polar_factor(torch.cat([part[side] for part in parts], dim=1)) for side in (0, 2))
        values = torch.cat([part[1] for part in parts])
        merged[key] = ((left * values) @ right.T).to(result_dtype(first.dtype))
    return {key: merged[key] for key in sorted(merged)}


@register_merge_method("iso_c", family="spectral", per_tensor=True)
def iso_c(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    rank_rule: str = "numerical",
    a: float = 0.0,
    non_matrix: Sequence[str] = NON_MATRIX,
) -> dict[str, Tensor]:
    """
    Iso-C: the sum of the task matrices with a flat spectrum (https://huggingface.co/papers/2502.04959).

    With `M = sum_t w_t Delta_t = P diag(s) Q.T`, the merged matrix is `P diag(s') Q.T`, where `s' = s**a * sum(s) /
    sum(s**a)`: the nuclear norm of M is kept; `a=0` makes all singular values equal (the paper), `a=1` returns M.
    Deviation: the spectrum is spread over the numerical rank of M; the authors' code spreads it over min(m, n), which
    puts energy into arbitrary directions when M is rank-deficient (`rank_rule="full"`).

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T factors on the matrices; not normalised.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        rank_rule (`str`, *optional*, defaults to `"numerical"`):
            Number of directions: `"numerical"` or `"full"`.
        a (`float`, *optional*, defaults to 0.0):
            Exponent in [0, 1] that interpolates between the flat and the original spectrum.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of 2-D tensors that take the mean, as all tensors that are not 2-D do. Defaults to
            embeddings, language-model heads and position biases.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: matrices like a *sum* (about
        T times the mean's), other tensors like a mean; inside ATM use an outer step between 1/T and 1.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: one decomposition of order min(m, n)^3 per matrix, in float64.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    matrices, merged = _mean_of_others(tasks, non_matrix)
    for key in matrices:
        dtype = result_dtype(tasks[0].tensors[key].dtype)
        total = weighted_sum((task.tensors[key].detach().double() for task in tasks), [task.weight for task in tasks])
        merged[key] = (total if a == 1 else _flatten_spectrum(total, rank_rule, a)).to(dtype)
    return {key: merged[key] for key in sorted(merged)}


def _flatten_spectrum(matrix: Tensor, rank_rule: str, a: float) -> Tensor:
    left, values, right = thin_svd(matrix)
    if values.numel() == 0:
        return torch.zeros_like(matrix)
    if rank_rule == "full" and values.numel() < min(matrix.shape):
        left, values, right_t = torch.linalg.svd(matrix, full_matrices=False)
        right = right_t.T
    shape = values.pow(a)
    return (left * (shape * (values.sum() / shape.sum()))) @ right.T


def _mean_of_others(tasks: Sequence[Task], non_matrix: Sequence[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Splits the keys: names of the matrices, and the merged mean of everything else."""
    matrices: list[str] = []
    others: list[str] = []
    for key in sorted_keys(tasks):
        # The decompositions commute with transposition, so transposed layouts (GPT-2's Conv1D) need no care.
        is_matrix = tasks[0].tensors[key].ndim == 2 and not any(fnmatchcase(key, pattern) for pattern in non_matrix)
        (matrices if is_matrix else others).append(key)
    if not others:
        return matrices, {}
    coefficients = linear_coefficients("mean", [task.weight for task in tasks])
    return matrices, {key: weighted_sum((task.tensors[key] for task in tasks), coefficients) for key in others}
