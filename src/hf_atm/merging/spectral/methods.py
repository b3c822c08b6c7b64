"""Spectral merges of weight matrices: TSV-M, Iso-C and Iso-CTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..gram import find_layout
from ..registry import register_merge_method
from ..tensors import canonical_tasks
from .decompositions import Triplets, polar_factor, rank_cutoff, reshape_spectrum, thin_svd
from .fused import qkv_groups
from .matrices import NON_MATRIX, TaskMatrices, merge_matrices


# Stacked singular vectors are orthonormal to float64 within each task, so that weak directions of the stack count.
_STACKED = 1e-7


@register_merge_method("tsv_m", family="spectral", per_tensor=True, group=qkv_groups)
def tsv_m(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    non_matrix: Sequence[str] = NON_MATRIX,
    fuse_qkv: bool | None = None,
    flatten_conv: bool = False,
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
        fuse_qkv (`bool`, *optional*):
            Queries, keys and values as stored (`None`), separate ones stacked and merged as one matrix (`True`), or
            fused ones merged apart (`False`); these are different merges, each of them valid. See [`qkv_groups`] and
            [`split_dimension`] for what is recognised.
        flatten_conv (`bool`, *optional*, defaults to `False`):
            Whether 4-D kernels are merged as matrices `(out, in * height * width)` instead of taking the mean.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: matrices like a *sum* (about
        T times the mean's), other tensors like a mean; inside ATM use an outer step between 1/T and 1.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: T + 2 decompositions of order r^3 per matrix; float64 workspace of about (m + n) r + m n entries.
    """
    return merge_matrices(
        canonical_tasks(task_vectors, weights, names), _decorrelate, non_matrix, fuse_qkv, flatten_conv
    )


@register_merge_method("iso_c", family="spectral", per_tensor=True, group=qkv_groups)
def iso_c(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    rank_rule: str = "numerical",
    a: float = 0.0,
    non_matrix: Sequence[str] = NON_MATRIX,
    fuse_qkv: bool | None = None,
    flatten_conv: bool = False,
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
        fuse_qkv (`bool`, *optional*):
            Queries, keys and values as stored (`None`), separate ones stacked and merged as one matrix (`True`), or
            fused ones merged apart (`False`); these are different merges, each of them valid. See [`qkv_groups`] and
            [`split_dimension`] for what is recognised.
        flatten_conv (`bool`, *optional*, defaults to `False`):
            Whether 4-D kernels are merged as matrices `(out, in * height * width)` instead of taking the mean.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: matrices like a *sum* (about
        T times the mean's), other tensors like a mean; inside ATM use an outer step between 1/T and 1.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: one decomposition of order min(m, n)^3 per matrix, in float64.
    """
    rule = partial(_flatten_spectrum, rank_rule=rank_rule, a=a)
    return merge_matrices(canonical_tasks(task_vectors, weights, names), rule, non_matrix, fuse_qkv, flatten_conv)


@register_merge_method("iso_cts", family="spectral", per_tensor=True, group=qkv_groups, prepare=find_layout)
def iso_cts(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    common_space_fraction: float = 0.8,
    non_matrix: Sequence[str] = NON_MATRIX,
    fuse_qkv: bool | None = None,
    flatten_conv: bool = False,
    transposed: Sequence[str] | None = None,
    context: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """
    Iso-CTS: common and task-specific directions with a flat spectrum (https://huggingface.co/papers/2502.04959).

    With r = min(m, n) and f the fraction, each task adds `k = round((r - floor(f r)) / T)` directions of its own. The
    sum `M = sum_t w_t Delta_t` gives its `r - T k` leading triplets (U_c, S_c, V_c), and each task the k leading ones
    of `(I - U_c U_c.T) w_t Delta_t`. The stacked left and right vectors are replaced by their polar factors, all
    singular values by their mean. Deviation: only directions within the numerical rank of M and of each task take
    part, since null vectors are arbitrary; k never exceeds `r / T`. A single task gives [`iso_c`].

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T factors on the matrices; not normalised. A task of weight zero takes no part and leaves its directions to
            the others.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation and stacking.
        common_space_fraction (`float`, *optional*, defaults to 0.8):
            Share of the directions taken from the sum, in [0, 1].
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of 2-D tensors that take the mean, as all tensors that are not 2-D do. Defaults to
            embeddings, language-model heads and position biases.
        fuse_qkv (`bool`, *optional*):
            Queries, keys and values as stored (`None`), stacked (`True`) or apart (`False`), see [`iso_c`].
        flatten_conv (`bool`, *optional*, defaults to `False`):
            Whether 4-D kernels are merged as matrices `(out, in * height * width)` instead of taking the mean.
        transposed (`Sequence[str]`, *optional*):
            Name patterns of the matrices stored `(in, out)`, as GPT-2's Conv1D: the projection acts on outputs. By
            default they are recognised by the shapes of their biases.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: matrices like a *sum* (about
        T times the mean's), other tensors like a mean; inside ATM use an outer step between 1/T and 1.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: T + 3 decompositions of order r^3 per matrix; float64 workspace of about (m + n) r + m n entries.
    """
    flipped = find_layout(task_vectors, weights, names, transposed=transposed) if context is None else context
    rule = partial(_join_spaces, common_space_fraction=common_space_fraction, flipped=flipped)
    return merge_matrices(canonical_tasks(task_vectors, weights, names), rule, non_matrix, fuse_qkv, flatten_conv)


def _decorrelate(matrices: TaskMatrices) -> Tensor:
    if len(matrices) == 1:
        return matrices[0].to(matrices.dtype)
    parts = [thin_svd(matrix, max(1, min(matrix.shape) // len(matrices))) for matrix in matrices]
    dtype = matrices.product_dtype
    left, right = _polar_sides(parts, dtype)
    return (left * torch.cat([part[1] for part in parts]).to(dtype)) @ right.T


def _join_spaces(matrices: TaskMatrices, common_space_fraction: float, flipped: frozenset[str]) -> Tensor:
    is_flipped = matrices.parts[0].key in flipped
    total = matrices.total()
    total = total.T if is_flipped else total
    rank, count = min(total.shape), len(matrices)
    specific = min(round((rank - int(common_space_fraction * rank)) / count), rank // count)
    common = thin_svd(total, rank - specific * count)
    parts = [common]
    for matrix in matrices:
        matrix = matrix.T if is_flipped else matrix
        left, values, right = thin_svd(matrix - common[0] @ (common[0].T @ matrix), specific)
        # What is left of a task inside the common space is rounding, although it has a rank of its own.
        kept = values > rank_cutoff(matrix) * torch.linalg.vector_norm(matrix) / rank**0.5
        parts.append((left[:, kept], values[kept], right[:, kept]))
    values, dtype = torch.cat([part[1] for part in parts]), matrices.product_dtype
    left, right = _polar_sides(parts, dtype)
    merged = (left * (values.sum() / max(1, values.numel())).to(dtype)) @ right.T
    return merged.T if is_flipped else merged


def _polar_sides(parts: Sequence[Triplets], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    left, right = (polar_factor(torch.cat([part[side] for part in parts], dim=1), dtype, _STACKED) for side in (0, 2))
    return left, right


def _flatten_spectrum(matrices: TaskMatrices, rank_rule: str, a: float) -> Tensor:
    matrix = matrices.total()
    if a == 1:
        return matrix.to(matrices.dtype)

    def shape(values: Tensor) -> Tensor:
        powers = values.pow(a)
        return powers * (values.sum() / powers.sum())

    return reshape_spectrum(matrix, shape, matrices.product_dtype, cutoff=0.0 if rank_rule == "full" else None)
