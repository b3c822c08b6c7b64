"""Alignment by dense matrices in float64 NumPy: slow, plain, and independent of the package."""

from __future__ import annotations

from itertools import permutations

import numpy as np


def matrix_of(vector):
    """P with P[i, c[i]] = 1."""
    result = np.zeros((len(vector), len(vector)))
    for row, column in enumerate(vector):
        result[row, column] = 1
    return result


def in_universe(tensor, rows, columns):
    """`P_rows^T W P_columns` of a (rows, columns, ...) tensor; None stands for an axis that stays."""
    if rows is not None:
        tensor = np.einsum("iu,i...->u...", rows, tensor)
    if columns is not None:
        tensor = np.einsum("jv,uj...->uv...", columns, tensor)
    return tensor


def pairwise_objective(models, axes, maps):
    """Sum over pairs of models and tensors of the inner products in the universe.

    `models`: dict of arrays per model; `axes`: (rows, columns) of group names or None; `maps`: dict of matrices per model.
    """
    value = 0.0
    for name, (rows, columns) in axes.items():
        seen = [
            in_universe(model[name], own.get(rows), own.get(columns)) for model, own in zip(models, maps, strict=True)
        ]
        for first in range(len(models)):
            for second in range(first):
                value += float((seen[first] * seen[second]).sum())
    return value


def best_heads(scores_qk, scores_v, heads, dim, qk_inner=True):
    """Largest `<G_qk, P_qk> + <G_v, P_v>` over all orders of heads and of the units inside, by trying all of them."""
    orders = list(permutations(range(dim)))
    best = -np.inf
    for outer in permutations(range(heads)):
        value = 0.0
        for source, target in enumerate(outer):
            rows = np.arange(source * dim, (source + 1) * dim)
            for scores, free in ((scores_qk, qk_inner), (scores_v, True)):
                candidates = orders if free else orders[:1]
                value += max(scores[rows, target * dim + np.array(order)].sum() for order in candidates)
        best = max(best, value)
    return best
