"""The published algorithm written out: dense float64 matrices, every pair of models on its own, a bounded line search."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import fminbound, linear_sum_assignment


def match(problem, max_iter: int = 200, tol: float = 1e-6) -> list[dict[str, np.ndarray]]:
    """
    Frank-Wolfe from the identity, then rounding.

    Args:
        problem ([`Problem`]): blocks of flat groups alone.
        max_iter (`int`, *optional*, defaults to 200): iterations at most.
        tol (`float`, *optional*, defaults to 1e-6): relative gain that ends the run.
    """
    models = range(problem.count)
    pairs = list(itertools.combinations(models, 2))
    weights = [[block.matrices[m].double().numpy() for m in models] for block in problem.blocks]
    maps = [{name: np.eye(size) for name, size in problem.sizes.items()} for _ in models]

    def through_columns(index, model, at):
        columns = problem.blocks[index].columns
        tensor = weights[index][model]
        return tensor if columns is None else np.einsum("rck,cd->rdk", tensor, at[model][columns], optimize=True)

    def through_rows(index, model, at):
        tensor = weights[index][model]
        return np.tensordot(at[model][problem.blocks[index].rows], tensor, (0, 0))

    def seen(index, model, at):
        return np.tensordot(at[model][problem.blocks[index].rows], through_columns(index, model, at), (0, 0))

    def value(at):
        return sum(
            float((seen(index, p, at) * seen(index, q, at)).sum())
            for index in range(len(problem.blocks))
            for p, q in pairs
        )

    def gradients(at):
        found = [{name: np.zeros((size, size)) for name, size in problem.sizes.items()} for _ in models]
        for index, block in enumerate(problem.blocks):
            for p, q in itertools.permutations(models, 2):
                other = seen(index, q, at)
                right = through_columns(index, p, at)
                found[p][block.rows] += right.reshape(len(right), -1) @ other.reshape(len(other), -1).T
                if block.columns is not None:
                    left = through_rows(index, p, at)
                    found[p][block.columns] += np.einsum("rck,rdk->cd", left, other, optimize=True)
        return found

    reached = value(maps)
    for _ in range(max_iter):
        slopes = gradients(maps)
        ends = [
            {name: np.eye(len(slope))[linear_sum_assignment(slope, maximize=True)[1]] for name, slope in mine.items()}
            for mine in slopes
        ]

        def between(step, maps=maps, ends=ends):
            return [
                {name: (1 - step) * now[name] + step * end[name] for name in now}
                for now, end in zip(maps, ends, strict=True)
            ]

        step = fminbound(lambda t, between=between: -value(between(t)), 0, 1, maxfun=20)
        maps = between(step)
        now = value(maps)
        if now - reached <= tol * abs(now):
            break
        reached = now
    return [{name: linear_sum_assignment(soft, maximize=True)[1] for name, soft in mine.items()} for mine in maps]
