"""Runs of Frank-Wolfe from several starts, and from the mean of what they found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .ascent import polish
from .frank_wolfe import climb
from .mixture import Mixture
from .permutation import Permutation
from .problem import Problem, objective
from .spec import PermutationSpec
from .starts import starting_point
from .workers import Map


# Share of its way up at which a run ends: when others follow, and when it is the last.
_EARLY, _LATE = 3e-2, 3e-3

# Sweeps of polish when other runs follow.
_FEW = 3


@dataclass
class Run:
    """
    A run of Frank-Wolfe, rounding and polish.

    Args:
        start (`str`): where it starts, a start's name or `"mean"`.
        point ([`Mixture`]): that point, and what Frank-Wolfe makes of it.
        values (`list[float]`): the objective before every iteration and after the last, after rounding, and after
            every sweep of the polish.
        gap, converged: as in [`Climb`].
        iterations (`int`): values before rounding.
        vectors (`list[dict[str, np.ndarray]]`): index vectors by model.
    """

    start: str
    point: Mixture
    values: list[float] = field(default_factory=list)
    gap: float = float("inf")
    converged: bool = False
    iterations: int = 0
    vectors: list[dict[str, np.ndarray]] = field(default_factory=list)

    def climb(self, pool: Map, max_iter: int, tol: float, share: float, fixed: Sequence[int] = ()) -> None:
        """Frank-Wolfe from where the run is; the way up counts from where it began."""
        origin = self.values[0] if self.values else None
        found = climb(self.point, pool, max_iter, tol, share, origin, fixed)
        self.values += found.values
        self.gap, self.converged = found.gap, found.converged
        self.iterations = len(self.values)

    def settle(self, pool: Map, sweeps: int) -> None:
        """Rounding, and the polish of what it gives."""
        self.vectors = self.point.rounded(pool)
        self.values.append(objective(self.point.problem, self.vectors))
        self.polish(pool, sweeps)

    def polish(self, pool: Map, sweeps: int) -> None:
        """Some sweeps of coordinate ascent."""
        self.vectors, gains = polish(self.point.problem, self.vectors, pool, sweeps)
        self.values += gains


def best_run(
    problem: Problem, pool: Map, starts: Sequence[str], max_iter: int, tol: float, sweeps: int, seed: int
) -> tuple[Run, list[tuple[str, float]]]:
    """
    The best of a run from every start, one from the mean of their results, and one from the mean of the best two.

    Local maxima agree in much. In the mean of some, what they agree in stands and the rest is open, and the maxima
    above it are higher; so the runs from the starts end early.

    Args:
        problem ([`Problem`]): the blocks.
        pool (`Callable`): map over threads, see [`workers`].
        starts (`Sequence[str]`): names of starts.
        max_iter, tol, sweeps, seed: `max_iter`, `tol`, `polish` and `seed` of [`align`].

    Returns:
        `tuple[Run, list[tuple[str, float]]]`: the run that ends highest, among equals the first; and of all runs the
        starts and ends.
    """
    several = len(starts) > 1
    share, few = (_EARLY, min(_FEW, sweeps)) if several else (_LATE, sweeps)
    runs: list[Run] = []
    for number, start in enumerate(starts):
        run = Run(start, starting_point(problem, start, seed, list(starts[:number]).count(start)))
        if start == "gauge":
            run.climb(pool, max_iter, tol, share, fixed=(0,))
        run.climb(pool, max_iter, tol, share)
        run.settle(pool, few)
        runs.append(run)
        if start == "identity" and run.iterations == 1:
            # The models share a frame already.
            return run, [(start, run.values[-1])]
    for parents in (len(runs), 2):
        different = _different(sorted(runs, key=lambda run: -run.values[-1])[:parents])
        if len(different) > 1:
            weight = 1 / len(different)
            run = Run("mean", Mixture(problem, [(weight, vectors) for vectors in different]))
            run.climb(pool, max_iter, tol, _LATE)
            run.settle(pool, sweeps)
            runs.append(run)
    best = max(runs, key=lambda run: run.values[-1])
    if several and best.start != "mean":
        best.polish(pool, sweeps - few)
    return best, [(run.start, run.values[-1]) for run in runs]


def _different(runs: Sequence[Run]) -> list[list[dict[str, np.ndarray]]]:
    """Index vectors of runs in the first model's frame, equal ones once."""
    found: list[list[dict[str, np.ndarray]]] = []
    for run in runs:
        spec = PermutationSpec(run.point.problem.groups, {})
        orders = [Permutation(spec, vectors) for vectors in run.vectors]
        back = orders[0].inverse()
        framed = [dict(order.compose(back).vectors) for order in orders]
        if not any(_equal(framed, other) for other in found):
            found.append(framed)
    return found


def _equal(first: Sequence[dict[str, np.ndarray]], second: Sequence[dict[str, np.ndarray]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(np.array_equal(vector, other[name]) for one, other in pairs for name, vector in one.items())
