"""Where Frank-Wolfe starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..seeding import derive_seed
from .ascent import block_scores
from .assignment import best_permutation
from .mixture import Mixture
from .permutation import Permutation
from .problem import Problem, gram
from .spec import PermutationSpec


STARTS = ("identity", "barycentre", "gauge", "anchored")

# Share of the random permutation that breaks the barycentre's ties.
_NOISE = 0.01


def starting_point(problem: Problem, name: str, seed: int, draw: int) -> Mixture:
    """
    The point that a run starts from.

    Args:
        problem ([`Problem`]): the blocks.
        name (`str`): `"identity"`; `"barycentre"`, near the mean of all admissible permutations; `"gauge"`, the first
            model in its own order and the others at the barycentre; `"anchored"`, every model matched to the first
            one, group by group from the groups whose surroundings are known.
        seed, draw (`int`): decide the noise of the barycentre.

    Returns:
        [`Mixture`]
    """
    models = range(problem.count)
    identity = problem.identity()
    if name == "identity":
        return Mixture(problem, [(1.0, [identity for _ in models])])
    if name == "gauge":
        return Mixture(problem, [(1.0, [None if model else identity for model in models])])
    if name == "anchored":
        return Mixture(problem, [(1.0, anchored(problem))])
    spec = PermutationSpec(problem.groups, {})
    noise = [Permutation.random(spec, derive_seed("barycentre", seed, draw, model)).vectors for model in models]
    return Mixture(problem, [(1 - _NOISE, [None for _ in models]), (_NOISE, noise)])


def anchored(problem: Problem) -> list[dict[str, np.ndarray]]:
    """Index vectors that match every model to the first one in one pass, from known groups outward."""
    order = _outward(problem)
    return [problem.identity()] + [_match_outward(problem, model, order) for model in range(1, problem.count)]


def _outward(problem: Problem) -> list[str]:
    """Groups so that the next one has the largest share of its weights in blocks whose other side is known."""
    energies = [gram([block.matrices[0]])[0, 0] for block in problem.blocks]
    known: list[str] = []
    waiting = list(problem.groups)
    while waiting:
        shares = {}
        for name in waiting:
            touching = problem.touching(name)
            whole = sum(energies[index] for index in touching)
            part = sum(energies[index] for index in touching if _is_known(problem, index, name, known))
            shares[name] = part / whole if whole else 0.0
        best = max(waiting, key=lambda name: shares[name])
        known.append(best)
        waiting.remove(best)
    return known


def _is_known(problem: Problem, index: int, name: str, known: Sequence[str]) -> bool:
    block = problem.blocks[index]
    sides = [side.partition(":")[0] for side in (block.rows, block.columns) if side]
    return sides.count(name) == 1 and all(side in known or side == name for side in sides)


def _match_outward(problem: Problem, model: int, order: Sequence[str]) -> dict[str, np.ndarray]:
    vectors: dict[str, np.ndarray] = {}
    for position, name in enumerate(order):
        scores = {variable: np.zeros((problem.sizes[variable],) * 2) for variable in problem.variables_of(name)}
        for index in problem.touching(name):
            if _is_known(problem, index, name, order[:position]):
                target = problem.blocks[index].matrices[0]
                for variable, score in block_scores(problem, index, model, vectors, target, list(scores)):
                    scores[variable] += score
        vectors |= best_permutation(name, problem.groups[name], scores)[0]
    return vectors
