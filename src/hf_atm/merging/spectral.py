"""Spectral merges of weight matrices: TSV-M and Iso-C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .decompositions import polar_factor, reshape_spectrum, thin_svd
from .matrices import NON_MATRIX, TaskMatrices, merge_matrices
from .registry import register_merge_method
from .tensors import canonical_tasks


# Stacked singular vectors are orthonormal to float64 within each task, so that weak directions of the stack count.
_STACKED = 1e-7


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
    return merge_matrices(canonical_tasks(task_vectors, weights, names), _decorrelate, non_matrix)


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
    rule = partial(_flatten_spectrum, rank_rule=rank_rule, a=a)
    return merge_matrices(canonical_tasks(task_vectors, weights, names), rule, non_matrix)


def _decorrelate(matrices: TaskMatrices) -> Tensor:
    dtype = matrices.dtype
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    parts = [thin_svd(matrix, max(1, min(matrix.shape) // len(matrices))) for matrix in matrices]
    left, right = (polar_factor(torch.cat([part[side] for part in parts], dim=1), dtype, _STACKED) for side in (0, 2))
    values = torch.cat([part[1] for part in parts]).to(dtype)
    return (left * values) @ right.T


def _flatten_spectrum(matrices: TaskMatrices, rank_rule: str, a: float) -> Tensor:
    matrix, dtype = matrices.total(), matrices.dtype
    if a == 1:
        return matrix.to(dtype)

    def shape(values: Tensor) -> Tensor:
        powers = values.pow(a)
        return powers * (values.sum() / powers.sum())

    return reshape_spectrum(matrix, shape, dtype, cutoff=0.0 if rank_rule == "full" else None)
