"""Least squares over matrices (kernel C): one solver for all methods that weigh inputs by Gram matrices; WUDI, SWUDI."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import transposed_keys
from .registry import register_merge_method
from .spectral.decompositions import gram_matrix, leading_eigh
from .spectral.matrices import NON_MATRIX, TaskMatrices, merge_matrices
from .tensors import Task, canonical_tasks


# Eigenvalues of a Gram matrix below this share of the largest are rounding noise of float32 inputs.
CUTOFF = torch.finfo(torch.float32).eps

SpectralFilter = Callable[[Tensor], Tensor]


def solve_gram(
    initial: Tensor, gram: Tensor, moment: Tensor, spectral_filter: SpectralFilter, rank: int | None = None
) -> Tensor:
    """
    Minimises `sum_t tr[(tau - tau_t) G_t (tau - tau_t).T]` as far as a filter of the spectrum lets it.

    With `C = sum_t G_t = Q diag(L) Q.T` and `D = sum_t tau_t G_t` the result is `initial + (D - initial C) Q diag(f(L))
    Q.T`. `f(L) = 1 / L` gives the minimiser, `f(L) = (1 - exp(-s L)) / L` gradient flow from `initial` for a time s.

    Args:
        initial (`Tensor`):
            Starting point, shape `(m, n)`, float64.
        gram (`Tensor`):
            C, shape `(n, n)`, float64, positive semi-definite.
        moment (`Tensor`):
            D, shape `(m, n)`, float64.
        spectral_filter (`Callable[[Tensor], Tensor]`):
            f on the eigenvalues, ascending, never negative.
        rank (`int`, *optional*):
            Only so many leading eigenvalues, in [1, n]; the filter of the others counts as zero.

    Returns:
        `Tensor`: shape `(m, n)`, float64.

    Cost: one symmetric eigendecomposition of order n.
    """
    values, vectors = _eigenpairs(gram, len(gram) if rank is None else min(rank, len(gram)))
    residual = moment - initial @ gram
    return initial + ((residual @ vectors) * spectral_filter(values)) @ vectors.T


def solve_least_squares(initial: Tensor, gram: Tensor, moment: Tensor, ridge: float = 0.0) -> Tensor:
    """
    [`solve_gram`] with `f(L) = 1 / (L + ridge)`, and 0 where that is rounding noise, without eigenvectors if it can.

    A Cholesky factorisation takes a quarter of the time. It is used where the inverse itself proves that no eigenvalue
    would have been cut off: `norm(C) * norm(inv(C))` bounds the condition number.

    Args:
        initial, gram, moment (`Tensor`):
            As in [`solve_gram`].
        ridge (`float`, *optional*, defaults to 0.0):
            Added to all eigenvalues, in units of their mean; at least 0.

    Returns:
        `Tensor`: shape `(m, n)`, float64.
    """
    shift = ridge * float(gram.diagonal().mean())
    shifted = gram.clone()
    shifted.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if not bool(failed):
        inverse = torch.cholesky_inverse(factor)
        if float(torch.linalg.matrix_norm(shifted) * torch.linalg.matrix_norm(inverse)) < 1 / CUTOFF:
            return initial + (moment - initial @ gram) @ inverse
    return solve_gram(initial, gram, moment, lambda values: _inverse(values + shift))


def _eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = leading_eigh(gram, count)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):
        # A slower way that always converges: singular vectors of a semi-definite matrix are its eigenvectors.
        vectors, values, _ = (part.to(gram.device) for part in torch.linalg.svd(gram.cpu()))
        values, vectors = values[:count].flip(0), vectors[:, :count].flip(1)
    return values.clamp(min=0), vectors


def _inverse(values: Tensor) -> Tensor:
    noise = values <= CUTOFF * values.max()
    return torch.where(noise, 0.0, 1 / torch.where(noise, 1.0, values))


def find_layout(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    transposed: Sequence[str] | None = None,
    **_kwargs: Any,
) -> frozenset[str]:
    """Which matrices are stored input side first; found over the whole model, because biases and siblings tell."""
    task = canonical_tasks(task_vectors, weights, names)[0]
    return transposed_keys({key: task.shape(key) for key in task.tensors}, transposed)


@register_merge_method("wudi", family="gram", per_tensor=True, prepare=find_layout)
def wudi(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    non_matrix: Sequence[str] = NON_MATRIX,
    transposed: Sequence[str] | None = None,
    context: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """
    WUDI in closed form: the matrix that least disturbs any task in the directions of its own rows
    (https://huggingface.co/papers/2503.08099).

    Minimises `sum_t norm((tau - tau_t) tau_t.T)**2 / norm(tau_t)**2`, the limit of the authors' 300 to 400 steps of
    Adam, from the sum on: `tau = S + (D - S C) pinv(C)` with `S = sum_t w_t tau_t`, `G_t = tau_t.T tau_t /
    norm(tau_t)**2`, `C = sum_t G_t`, `D = sum_t w_t tau_t G_t`. Orthogonal row spaces give the sum, equal Gram matrices
    the mean. Deviation: a minimum reached exactly amplifies weak directions, which the authors' loop never gets to;
    [`swudi`] leaves them at the sum and does better.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T factors on the matrices; not normalised. A task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of 2-D tensors that take the mean, as all tensors that are not 2-D do. Defaults to
            embeddings, language-model heads and position biases.
        transposed (`Sequence[str]`, *optional*):
            Name patterns of matrices of shape `(inputs, outputs)`, such as those of GPT-2; by default found from the
            lengths of the biases. All others have shape `(outputs, inputs)`.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: matrices like a *sum*, other
        tensors like a mean; inside ATM use an outer step between 1/T and 1.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: per matrix with n inputs and m outputs an inverse or eigendecomposition of order n^3 and T products of order
    m n^2, in float64; workspace 4 n^2 + 5 m n entries for any T.
    """
    tasks, flipped = canonical_tasks(task_vectors, weights, names), context
    if flipped is None:
        flipped = find_layout(task_vectors, weights, names, transposed=transposed)
    return _merge_data_free(tasks, non_matrix, flipped, solve_least_squares)


@register_merge_method("swudi", family="gram", per_tensor=True, prepare=find_layout)
def swudi(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    flow_time: float = math.inf,
    rank: int | None = None,
    non_matrix: Sequence[str] = NON_MATRIX,
    transposed: Sequence[str] | None = None,
    context: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """
    SWUDI: [`wudi`] with a filtered spectrum (https://huggingface.co/papers/2606.07289).

    `tau = S + (D - S C) Q diag(f(L)) Q.T` with `C = Q diag(L) Q.T` and `f(L_k) = (1 - exp(-s L_k)) / L_k` for the K
    largest eigenvalues, 0 for the others, whose directions keep the sum. s is the time of gradient flow from the sum
    on; K is the participation ratio `sum(L)**2 / sum(L**2)`, rounded down, unless it is given. The rule for K follows a
    secondary source.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T factors on the matrices; not normalised. A task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        flow_time (`float`, *optional*, defaults to infinity):
            s, positive; the trace of C is T, so that times far above n / T change little.
        rank (`int`, *optional*):
            K, at least 1; n or more keeps the whole spectrum.
        non_matrix, transposed (`Sequence[str]`, *optional*):
            As in [`wudi`].

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: as that of [`wudi`].

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.

    Cost: as [`wudi`], with an eigendecomposition of the K leading pairs.
    """

    def solve(initial: Tensor, gram: Tensor, moment: Tensor) -> Tensor:
        count = _participation_ratio(gram) if rank is None else rank
        return solve_gram(initial, gram, moment, lambda values: _flow(values, flow_time), count)

    tasks, flipped = canonical_tasks(task_vectors, weights, names), context
    if flipped is None:
        flipped = find_layout(task_vectors, weights, names, transposed=transposed)
    return _merge_data_free(tasks, non_matrix, flipped, solve)


def _merge_data_free(
    tasks: Sequence[Task],
    non_matrix: Sequence[str],
    flipped: frozenset[str],
    solve: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    def rule(matrices: TaskMatrices) -> Tensor:
        if len(matrices) == 1:
            return matrices.total().to(matrices.dtype)
        flip = matrices.parts[0].key in flipped
        initial, gram, moment = _interference_terms(matrices, flip)
        solution = solve(initial, gram, moment) if bool(gram.any()) else initial
        return (solution.T if flip else solution).to(matrices.dtype)

    return merge_matrices(tasks, rule, non_matrix)


def _interference_terms(matrices: Iterable[Tensor], flip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """S, C and D of WUDI, accumulated over the task matrices, which come one at a time."""
    initial = gram = moment = None
    for matrix in matrices:
        vector = matrix.T if flip else matrix
        if initial is None or gram is None or moment is None:
            initial, moment = torch.zeros_like(vector), torch.zeros_like(vector)
            gram = vector.new_zeros(vector.shape[1], vector.shape[1])
        square = float(vector.square().sum())
        if square == 0:
            continue
        initial += vector
        product = gram_matrix(vector)
        gram.add_(product, alpha=1 / square)
        # Both orders of the triple product are the same matrix; the smaller inner one is cheaper.
        if vector.shape[0] < vector.shape[1]:
            moment.addmm_(gram_matrix(vector.T), vector, alpha=1 / square)
        else:
            moment.addmm_(vector, product, alpha=1 / square)
    assert initial is not None and gram is not None and moment is not None, "There is at least one task."
    return initial, gram, moment


def _participation_ratio(gram: Tensor) -> int:
    """`tr(C)**2 / tr(C**2)` rounded down, at least 1; the slack lets n equal eigenvalues count n."""
    ratio = float(gram.diagonal().sum() ** 2 / gram.square().sum())
    return max(1, int(ratio * (1 + 1e-9)))


def _flow(values: Tensor, time: float) -> Tensor:
    if math.isinf(time):
        return _inverse(values)
    positive = torch.where(values > 0, values, 1.0)
    return torch.where(values > 0, -torch.expm1(-time * positive) / positive, time)
