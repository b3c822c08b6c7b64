"""Merges that weigh by what was measured on data: RegMean (Gram matrices) and Fisher merging (diagonals)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..elementwise.chunks import merge_chunks, plain_sum
from ..gram import find_layout, solve_least_squares
from ..linear import linear_coefficients
from ..registry import register_merge_method
from ..shares import shares
from ..spectral.matrices import NON_MATRIX
from ..task_vectors import euclidean_norm
from ..tensors import Task, canonical_tasks, check_finite, listed, sorted_keys


Statistics = Mapping[str, Tensor]

# Added to normalised Fisher information, so that entries nobody cares for take the mean.
_FISHER_FLOOR = 1e-6


@dataclass(frozen=True)
class _Measured:
    """All statistics, opened and checked, in the order of the inputs."""

    statistics: list[Statistics]
    keys: frozenset[str]
    transposed: frozenset[str] = frozenset()
    norms: tuple[float, ...] = ()


def _find_gram(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    statistics: Sequence[Statistics | str | os.PathLike],
    non_matrix: Sequence[str] = NON_MATRIX,
    transposed: Sequence[str] | None = None,
    **_kwargs: Any,
) -> _Measured:
    task = canonical_tasks(task_vectors, weights, names)[0]
    layout = find_layout(task_vectors, weights, names, transposed=transposed)
    matrices = [
        key
        for key in sorted(task.tensors)
        if len(task.shape(key)) >= 2 and not any(fnmatchcase(key, pattern) for pattern in non_matrix)
    ]
    opened = _open_all("regmean", statistics, names)
    keys = _measured_keys("regmean", opened, matrices, names)
    flipped = []
    for key in keys:
        rows, columns = task.shape(key)[0], task.shape(key)[1:].numel()
        # The matrix itself tells the input side, unless the weight is square.
        side = opened[0][key].shape[:1]
        is_flipped = key in layout if rows == columns else side == (rows,)
        if is_flipped:
            flipped.append(key)
        _check_shapes(key, opened, names, (rows, rows) if is_flipped else (columns, columns))
    return _Measured(opened, frozenset(keys), frozenset(flipped))


@register_merge_method("regmean", family="gram", requires_base=False, per_tensor=True, prepare=_find_gram)
def regmean(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    statistics: Sequence[Statistics | str | os.PathLike],
    a: float = 0.95,
    ridge: float = 0.0,
    non_matrix: Sequence[str] = NON_MATRIX,
    transposed: Sequence[str] | None = None,
    context: _Measured | None = None,
) -> dict[str, Tensor]:
    """
    RegMean: the linear layer whose outputs are closest to those of all models on their own inputs
    (https://huggingface.co/papers/2212.09849).

    Minimises `sum_t p_t tr[(W - W_t) G_t (W - W_t).T]` with `p = w / sum(w)` and `G_t = X_t.T X_t`, its off-diagonal
    entries times `a`: `W = M + (D - M C) inv(C + r)` with the mean M, `C = sum_t p_t G_t`, `D = sum_t p_t W_t G_t`.
    Written from the mean on, it is the authors' `D inv(C)` where the inputs reach every direction, and the mean in
    directions that no input has.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point; parameters or task vectors, which give the same.
        weights (`Sequence[float]`):
            T non-negative weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        statistics (`Sequence[Mapping[str, Tensor] | str]`):
            In the order of the inputs, T mappings from weight name to `(n, n)` matrix, or safetensors files with them,
            which are read matrix by matrix; see [`collect_gram`]. Weights without a matrix in any of them take the mean.
        a (`float`, *optional*, defaults to 0.95):
            Factor on off-diagonal entries in [0, 1].
        ridge (`float`, *optional*, defaults to 0.0):
            r, in units of the mean eigenvalue of C, at least 0; pulls towards the mean.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of tensors that take the mean even so, as all of less than two dimensions do. Defaults to
            embeddings, language-model heads and position biases.
        transposed (`Sequence[str]`, *optional*):
            Name patterns of square matrices of shape `(inputs, outputs)`; by default found from the lengths of the
            biases. Other matrices show it by the size of their statistics.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean.

    Raises:
        `ValueError`: if statistics are missing for some model or tensor, have a wrong shape or entries that are not
            finite, or if a weight is negative or all are zero.

    Cost: per matrix with n inputs and m outputs an inverse of order n^3 and T products of order m n^2, in float64;
    workspace 4 n^2 + 5 m n entries for any T.
    """
    found = context or _find_gram(
        task_vectors, weights, names, statistics=statistics, non_matrix=non_matrix, transposed=transposed
    )
    tasks = _with_shares("regmean", canonical_tasks(task_vectors, weights, names, found.statistics))

    def merge(key: str) -> Tensor:
        flip = key in found.transposed
        solution = solve_least_squares(*_regression_terms(tasks, key, a, flip), ridge)
        return (solution.T.contiguous() if flip else solution).reshape(tasks[0].shape(key))

    return _merge_or_average(tasks, found.keys, merge)


def _regression_terms(tasks: Sequence[Task], key: str, a: float, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, C and D of RegMean, accumulated over the tasks."""
    first = tasks[0].tensor(key).flatten(1)
    initial = torch.zeros_like(first.T if flip else first, dtype=torch.float64)
    moment = torch.zeros_like(initial)
    gram = torch.zeros(initial.shape[1], initial.shape[1], dtype=torch.float64, device=initial.device)
    for task in tasks:
        weight = task.tensor(key).double().flatten(1)
        weight = weight.T if flip else weight
        statistic = task.extra[key].to(initial.device, torch.float64)
        check_finite(statistic, key, f"statistics of {task.name}")
        part = statistic * (a * task.weight)
        part.diagonal().copy_(statistic.diagonal() * task.weight)
        initial.add_(weight, alpha=task.weight)
        gram += part
        moment.addmm_(weight, part)
    return initial, gram, moment


def _find_fisher(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    statistics: Sequence[Statistics | str | os.PathLike],
    **_kwargs: Any,
) -> _Measured:
    task = canonical_tasks(task_vectors, weights, names)[0]
    opened = _open_all("fisher", statistics, names)
    filled = [key for key in sorted(task.tensors) if task.shape(key).numel()]
    keys = _measured_keys("fisher", opened, filled, names)
    for key in keys:
        _check_shapes(key, opened, names, tuple(task.shape(key)))
        for name, mapping in zip(names, opened, strict=True):
            check_finite(mapping[key], key, f"statistics of {name}")
            if bool((mapping[key] < 0).any()):
                raise ValueError(
                    f"Statistics of '{name}' for '{key}' are negative, which Fisher information never is."
                )
    norms = tuple(euclidean_norm({key: mapping[key] for key in keys}) for mapping in opened)
    return _Measured(opened, frozenset(keys), norms=norms)


@register_merge_method("fisher", family="geometric", requires_base=False, per_tensor=True, prepare=_find_fisher)
def fisher(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    statistics: Sequence[Statistics | str | os.PathLike],
    context: _Measured | None = None,
) -> dict[str, Tensor]:
    """
    Fisher merging: a mean in which each entry of each model counts as much as its predictions depend on it
    (https://huggingface.co/papers/2111.09832).

    `sum_t w_t (F_t + 1e-6) theta_t / sum_t w_t (F_t + 1e-6)` with the diagonals F_t divided by their Euclidean norms
    over the model. Equal statistics give the mean.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point; parameters or task vectors, which give the same.
        weights (`Sequence[float]`):
            T non-negative weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        statistics (`Sequence[Mapping[str, Tensor] | str]`):
            In the order of the inputs, T mappings from tensor name to non-negative tensor of its shape, or safetensors
            files with them, which are read tensor by tensor; see [`collect_fisher`]. Tensors without statistics in any
            of them take the mean.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean.

    Raises:
        `ValueError`: if statistics are missing for some model or tensor, are negative, not finite or of another shape,
            or if a weight is negative or all are zero.

    Cost: two passes over the statistics, one over the inputs.
    """
    found = context or _find_fisher(task_vectors, weights, names, statistics=statistics)
    beside = list(zip(found.statistics, found.norms, strict=True))
    tasks = _with_shares("fisher", canonical_tasks(task_vectors, weights, names, beside))
    return _merge_or_average(
        tasks, found.keys, lambda key: merge_chunks(tasks, key, partial(_fisher_mean, tasks, key))
    )


def _fisher_mean(tasks: Sequence[Task], key: str, start: int, chunks: list[Tensor]) -> Tensor:
    total = divisor = torch.zeros_like(chunks[0], dtype=torch.float64)
    for task, chunk in zip(tasks, chunks, strict=True):
        statistics, norm = task.extra
        information = statistics[key].reshape(-1)[start : start + len(chunk)].to(chunk.device, torch.float64)
        importance = (information / (norm or 1.0) + _FISHER_FLOOR) * task.weight
        total = total + importance * chunk
        divisor = divisor + importance
    return total / divisor


def _merge_or_average(
    tasks: Sequence[Task], keys: Collection[str], merge: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """
    Every tensor by its name: `merge(key)` where the key is one of `keys`, the weighted mean of all others.

    A single task is returned as it is, times its weight, because every method of this kind would.
    """
    merged = {}
    for key in sorted_keys(tasks):
        if key not in keys:
            coefficients = linear_coefficients("mean", [task.weight for task in tasks])
            merged[key] = plain_sum(tasks, key, coefficients)
        elif len(tasks) == 1:
            merged[key] = plain_sum(tasks[:1], key, [tasks[0].weight])
        else:
            merged[key] = merge(key).to(tasks[0].dtype(key))
    return merged


def _with_shares(method: str, tasks: Sequence[Task]) -> list[Task]:
    parts = shares(method, [task.weight for task in tasks])
    return [replace(task, weight=part) for task, part in zip(tasks, parts, strict=True)]


def _open_all(
    method: str, statistics: Sequence[Statistics | str | os.PathLike], names: Sequence[str]
) -> list[Statistics]:
    """Mappings as they are, and paths as mappings that read a tensor when it is asked for."""
    if isinstance(statistics, (str, Mapping)):
        raise ValueError(f"Merge method '{method}' takes a list of statistics, one mapping or file per model.")
    if len(statistics) != len(names):
        raise ValueError(
            f"Merge method '{method}' got {len(statistics)} statistics for {len(names)} models; give one per model, in "
            "the order of the models."
        )
    # Reading files rests on the methods, not the other way round.
    from ..checkpoints import CheckpointReader

    return [item if isinstance(item, Mapping) else CheckpointReader(Path(item)) for item in statistics]


def _measured_keys(
    method: str, statistics: Sequence[Statistics], keys: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Those of the keys that all statistics hold; none of them, or some in only a few, are mistakes."""
    for name, mapping in zip(names, statistics, strict=True):
        missing = [key for key in keys if key not in mapping and any(key in other for other in statistics)]
        if missing:
            raise ValueError(
                f"Statistics of '{name}' lack {listed(missing)}, which others have; collect them alike for all models."
            )
    found = [key for key in keys if key in statistics[0]]
    if keys and not found:
        raise ValueError(
            f"Merge method '{method}' got statistics for none of the tensors {listed(keys)}; their names must be those "
            "of the state dict."
        )
    return found


def _check_shapes(key: str, statistics: Sequence[Statistics], names: Sequence[str], expected: tuple[int, ...]) -> None:
    for name, mapping in zip(names, statistics, strict=True):
        shape = tuple(mapping[key].shape)
        if shape != expected:
            raise ValueError(f"Statistics of '{name}' for '{key}' have shape {shape}, expected {expected}.")
