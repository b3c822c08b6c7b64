"""The linear oracle: the admissible permutation of largest inner product with a matrix."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from .spec import Flat, Group, Heads


def best_permutation(name: str, group: Group, scores: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """
    Maximises `sum_v <scores[v], P_v>` over the admissible permutations of one group, exactly.

    A flat group is one linear assignment. For heads, every pair of a source and a target head is worth its best inner
    orders, and an outer assignment pairs the heads: cost O(kv^2 dim^3 + kv^3).

    Args:
        name (`str`): name of the group.
        group (`Flat` or `Heads`): its kind.
        scores (`dict[str, np.ndarray]`): a square float64 matrix per index vector of the group.

    Returns:
        `tuple[dict[str, np.ndarray], float]`: index vectors and the largest value.
    """
    if isinstance(group, Flat):
        columns = _assignment(scores[name])
        return {name: columns}, inner_product(scores[name], columns)
    return _best_heads(name, group, scores)


def _best_heads(name: str, group: Heads, scores: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    kv, dim = group.kv, group.dim
    values = np.zeros((kv, kv))
    inner: dict[str, np.ndarray] = {}
    for kind, free in (("qk", group.qk_inner), ("v", group.v_inner)):
        blocks = scores[f"{name}:{kind}"].reshape(kv, dim, kv, dim).transpose(0, 2, 1, 3)
        orders = np.broadcast_to(np.arange(dim), (kv, kv, dim)).copy()
        if free:
            for source in range(kv):
                for target in range(kv):
                    orders[source, target] = _assignment(blocks[source, target])
        values += np.take_along_axis(blocks, orders[..., None], axis=3).sum(axis=(2, 3))
        inner[kind] = orders
    outer = _assignment(values)
    vectors = {
        f"{name}:{kind}": (outer[:, None] * dim + orders[np.arange(kv), outer]).reshape(-1)
        for kind, orders in inner.items()
    }
    return vectors, inner_product(values, outer)


def inner_product(scores: np.ndarray, vector: np.ndarray) -> float:
    """`<scores, P>` for the permutation of an index vector."""
    return float(scores[np.arange(len(vector)), vector].sum())


def _assignment(scores: np.ndarray) -> np.ndarray:
    # A zero in every row and column of the costs leaves the solver a third less to do.
    costs = scores.max(axis=1, keepdims=True) - scores
    costs -= costs.min(axis=0)
    return linear_sum_assignment(costs)[1]
