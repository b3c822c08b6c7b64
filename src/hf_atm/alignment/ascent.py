"""Coordinate ascent over permutations: the polish of Frank-Wolfe, Git Re-Basin (arXiv 2209.04836) and MergeMany."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from ..seeding import derive_seed
from .assignment import best_permutation, inner_product
from .problem import Problem, column_scores, gram, in_universe, objective, pair_sum, reorder, row_scores, total
from .workers import Map


# A gain below this share of what it is measured against is rounding.
_NOISE = 1e-9


def match_model(
    problem: Problem,
    model: int,
    vectors: Mapping[str, np.ndarray],
    targets: Sequence[Tensor],
    sweeps: Iterable[Sequence[str]],
    pool: Map,
) -> tuple[dict[str, np.ndarray], bool]:
    """
    Matches one model to fixed targets, one group at a time, each to its best permutation given the others.

    Neighbours in a sweep that share no block are matched at once, which changes nothing but the time.

    Args:
        problem ([`Problem`]): the blocks.
        model (`int`): which model.
        vectors (`Mapping[str, np.ndarray]`): its index vectors so far; not changed.
        targets (`Sequence[Tensor]`): by block, what its matrix should look like in the universe.
        sweeps (`Iterable[Sequence[str]]`): the groups in the order of each sweep; ends early when one changes nothing.
        pool (`Callable`): map over threads.

    Returns:
        `tuple[dict[str, np.ndarray], bool]`: index vectors, and whether any changed.
    """
    current, changed = dict(vectors), False
    for order in sweeps:
        moved = False
        for run in problem.together(order):
            found = _better(problem, model, current, targets, run, pool)
            current |= found
            moved |= bool(found)
        changed |= moved
        if not moved:
            break
    return current, changed


def _better(
    problem: Problem,
    model: int,
    vectors: Mapping[str, np.ndarray],
    targets: Sequence[Tensor],
    names: Sequence[str],
    pool: Map,
) -> dict[str, np.ndarray]:
    """Better orders of groups that share no block, of those for which there are some."""
    variables = {name: problem.variables_of(name) for name in names}
    scores = {name: {v: np.zeros((problem.sizes[v],) * 2) for v in variables[name]} for name in names}
    places = [(name, index) for name in names for index in problem.touching(name)]

    def score(place: tuple[str, int]) -> list[tuple[str, np.ndarray]]:
        name, index = place
        return block_scores(problem, index, model, vectors, targets[index], variables[name])

    for (name, _), parts in zip(places, pool(score, places), strict=True):
        for variable, part in parts:
            scores[name][variable] += part
    found = pool(lambda name: _improved(problem, model, vectors, targets, name, scores[name]), names)
    return {variable: vector for orders in found for variable, vector in orders.items()}


def _improved(
    problem: Problem,
    model: int,
    vectors: Mapping[str, np.ndarray],
    targets: Sequence[Tensor],
    name: str,
    scores: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The order of one group that its scores say is best, if it is better than the present one."""
    best, value = best_permutation(name, problem.groups[name], scores)
    before = sum(inner_product(score, vectors[variable]) for variable, score in scores.items())
    scale = sum(np.abs(score).max(axis=1).sum() for score in scores.values())
    if value - before <= _NOISE * scale:
        return {}
    touching = problem.touching(name)
    if any(problem.blocks[index].columns in scores and problem.blocks[index].rows in scores for index in touching):
        # On both axes of a tensor the score is no longer linear, and its maximum may be a loss.
        after = {**vectors, **best}
        old, new = (
            sum(gram([in_universe(problem.blocks[i], model, state), targets[i]])[0, 1] for i in touching)
            for state in (vectors, after)
        )
        if new - old <= _NOISE * scale:
            return {}
    return best


def block_scores(
    problem: Problem,
    index: int,
    model: int,
    vectors: Mapping[str, np.ndarray],
    target: Tensor,
    variables: Sequence[str],
) -> list[tuple[str, np.ndarray]]:
    """What a block says about the order of some index vectors, given that of its other side and a target."""
    block = problem.blocks[index]
    matrix = block.matrices[model]
    found = []
    if block.rows in variables:
        right = matrix if block.columns is None else reorder(matrix, vectors[block.columns], 1)
        found.append((block.rows, row_scores(right, target)))
    if block.columns is not None and block.columns in variables:
        found.append((block.columns, column_scores(reorder(matrix, vectors[block.rows], 0), target)))
    return found


def polish(
    problem: Problem,
    vectors: Sequence[Mapping[str, np.ndarray]],
    pool: Map,
    sweeps: int = 10,
    order: Callable[[int], Sequence[int]] | None = None,
    inner_sweeps: int = 1,
) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """
    Matches every model in turn to the sum of the others; the objective never falls.

    Args:
        problem ([`Problem`]): the blocks.
        vectors (`Sequence[Mapping[str, np.ndarray]]`): index vectors by model; not changed.
        pool (`Callable`): map over threads.
        sweeps (`int`, *optional*, defaults to 10): sweeps over the models at most.
        order (`Callable[[int], Sequence[int]]`, *optional*): the models in the order of each sweep.
        inner_sweeps (`int`, *optional*, defaults to 1): sweeps over the groups of a model at most.

    Returns:
        `tuple[list[dict[str, np.ndarray]], list[float]]`: index vectors, and the objective after every sweep that
        changed some.
    """
    current = [dict(model) for model in vectors]
    models = range(problem.count)
    seen = [[in_universe(block, model, current[model]) for model in models] for block in problem.blocks]
    values = []
    groups = _apart(problem)
    for sweep in range(sweeps):
        moved = False
        sums = [total(matrices) for matrices in seen]
        for model in order(sweep) if order else models:
            others = [whole.sub_(matrices[model]) for whole, matrices in zip(sums, seen, strict=True)]
            current[model], changed = match_model(
                problem, model, current[model], others, [groups] * inner_sweeps, pool
            )
            if changed:
                moved = True
                for block, matrices in zip(problem.blocks, seen, strict=True):
                    matrices[model] = in_universe(block, model, current[model])
            sums = [rest.add_(matrices[model]) for rest, matrices in zip(others, seen, strict=True)]
        if not moved:
            break
        values.append(sum(map(pair_sum, seen)))
    return current, values


def _apart(problem: Problem) -> list[str]:
    """The groups in an order in which many that share no block follow each other."""
    waiting, order = list(problem.groups), []
    while waiting:
        run: list[str] = []
        for name in waiting:
            if len(problem.together([*run, name])) == 1:
                run.append(name)
        order += run
        waiting = [name for name in waiting if name not in run]
    return order


def git_rebasin(
    problem: Problem, pool: Map, seed: int, sweeps: int = 100
) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """
    Matches every model to the first one, groups in random order, until a sweep changes nothing (Git Re-Basin).

    Returns:
        `tuple[list[dict[str, np.ndarray]], list[float]]`: index vectors by model, and the objective at the end.
    """
    groups = list(problem.groups)
    targets = [block.matrices[0] for block in problem.blocks]
    vectors = [problem.identity()]
    for model in range(1, problem.count):
        draw = np.random.default_rng(derive_seed("git-rebasin", seed, model))
        orders = ([groups[index] for index in draw.permutation(len(groups))] for _ in range(sweeps))
        vectors.append(match_model(problem, model, problem.identity(), targets, orders, pool)[0])
    return vectors, [objective(problem, vectors)]


def merge_many(
    problem: Problem, pool: Map, seed: int, sweeps: int = 100
) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """
    Matches each model, in random order, to the mean of the others until no distance falls (MergeMany).

    The mean and the sum of the others give the same assignments, so this is ascent on the objective of C2M3.

    Returns:
        `tuple[list[dict[str, np.ndarray]], list[float]]`: index vectors by model, and the objective after every sweep.
    """
    draw = np.random.default_rng(derive_seed("merge-many", seed))
    start = [problem.identity() for _ in range(problem.count)]
    return polish(
        problem, start, pool, sweeps, lambda _: draw.permutation(problem.count).tolist(), inner_sweeps=sweeps
    )
