"""Frank-Wolfe over all models and groups at once, with an exact line search (C2M3, arXiv 2405.17897)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .assignment import best_permutation
from .mixture import Mixture
from .problem import Problem, column_scores, gram, pair_sum, reorder, row_scores, total
from .workers import Map


@dataclass
class Climb:
    """
    What a run of Frank-Wolfe did.

    Args:
        values (`list[float]`): objective before every iteration and after the last.
        gap (`float`): the last Frank-Wolfe gap: no point is better by more, in the relaxed problem's linear model.
        converged (`bool`): whether the climb ended before the iterations ran out.
    """

    values: list[float] = field(default_factory=list)
    gap: float = float("inf")
    converged: bool = False


def climb(
    point: Mixture,
    pool: Map,
    max_iter: int = 200,
    tol: float = 1e-6,
    least_share: float = 0.0,
    origin: float | None = None,
    fixed: Collection[int] = (),
) -> Climb:
    """
    Climbs from a point, which is moved, towards a stationary one.

    Args:
        point ([`Mixture`]): where to start.
        pool (`Callable`): map over threads, see [`workers`].
        max_iter (`int`, *optional*, defaults to 200): iterations at most.
        tol (`float`, *optional*, defaults to 1e-6): stops when gap or gain fall to this share of the objective.
        least_share (`float`, *optional*, defaults to 0.0): stops when a step gains at most this share of the way up.
        origin (`float`, *optional*): objective at which the way up began; by default that of the point. Measured from
            there, what no order changes does not count.
        fixed (`Collection[int]`, *optional*): models that stay in their own order.

    Returns:
        [`Climb`]
    """
    result = Climb()
    problem = point.problem
    free = [model for model in range(problem.count) if model not in fixed]
    for _ in range(max_iter):
        direction = _oracle(problem, gradients(point, pool), free, pool)
        stages, line = _line(point, direction, pool)
        value = float(line[0])
        result.values.append(value)
        # The slope towards the oracle's answer is the Frank-Wolfe gap.
        result.gap = float(line[1])
        origin = value if origin is None else origin
        step, gain = best_step(line)
        if result.gap <= tol * abs(value) or step == 0:
            result.converged = True
            return result
        point.advance(step, direction, _blended(stages, step, pool), pool)
        if gain <= max(tol * abs(value), least_share * (value + gain - origin)):
            result.converged = True
            break
    result.values.append(value_of(point))
    return result


def value_of(point: Mixture) -> float:
    """The objective at a point, in float64."""
    return sum(pair_sum(seen) for seen in point.seen)


def gradients(point: Mixture, pool: Map) -> list[dict[str, np.ndarray]]:
    """Gradients of the objective by model and index vector, float64."""
    problem = point.problem
    sums = [total(seen) for seen in point.seen]

    def task(place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        index, model = place
        others = sums[index] - point.seen[index][model]
        rows = row_scores(point.right[index][model], others)
        ordered = problem.blocks[index].columns is not None
        return rows, column_scores(point.left[index][model], others) if ordered else None

    places = [(index, model) for index in range(len(problem.blocks)) for model in range(problem.count)]
    scores = [{name: np.zeros((size, size)) for name, size in problem.sizes.items()} for _ in range(problem.count)]
    for (index, model), (rows, columns) in zip(places, pool(task, places), strict=True):
        block = problem.blocks[index]
        scores[model][block.rows] += rows
        if block.columns is not None:
            scores[model][block.columns] += columns
    return scores


def _oracle(
    problem: Problem, scores: Sequence[dict[str, np.ndarray]], free: Sequence[int], pool: Map
) -> list[dict[str, np.ndarray]]:
    places = [(name, model) for model in free for name in problem.groups]
    found = pool(lambda place: best_permutation(place[0], problem.groups[place[0]], scores[place[1]]), places)
    direction = [problem.identity() for _ in range(problem.count)]
    for (_, model), (vectors, _) in zip(places, found, strict=True):
        direction[model].update(vectors)
    return direction


# Per block and model the tensors that the path to a direction blends: start, (mixed term,) end.
Stages = list[list[list[Tensor]]]


def _line(point: Mixture, direction: Sequence[Mapping[str, np.ndarray]], pool: Map) -> tuple[Stages, np.ndarray]:
    """
    The objective on the way to a direction, exactly.

    Moving all matrices by t, a block looks like `(1-t)^2 A + t(1-t) B + t^2 C` with `B = D_rows^T (W P_columns) +
    (P_rows^T W) D_columns`, or `(1-t) A + t C` where only rows are ordered: inner products of A, B and C are all that
    the quartic needs.

    Returns:
        `tuple[Stages, np.ndarray]`: A, B, C of all blocks, and the quartic's five coefficients, constant first.
    """
    problem = point.problem

    def stage(place: tuple[int, int]) -> tuple[list[Tensor], np.ndarray]:
        index, model = place
        block, vectors = problem.blocks[index], direction[model]
        parts = [point.seen[index][model]]
        rows = vectors[block.rows]
        if block.columns is None:
            parts.append(reorder(block.matrices[model], rows, 0))
        else:
            columns = vectors[block.columns]
            mixed = reorder(point.right[index][model], rows, 0).add_(reorder(point.left[index][model], columns, 1))
            parts += [mixed, reorder(reorder(block.matrices[model], rows, 0), columns, 1)]
        return parts, gram(parts)

    def together(parts: list[list[Tensor]]) -> np.ndarray:
        return gram([total(same) for same in zip(*parts, strict=True)])

    places = [(index, model) for index in range(len(problem.blocks)) for model in range(problem.count)]
    done = pool(stage, places)
    count = problem.count
    stages = [[parts for parts, _ in done[start : start + count]] for start in range(0, len(done), count)]
    coefficients = np.zeros(5)
    for index, products in enumerate(pool(together, stages)):
        own = sum(gram_of for _, gram_of in done[index * count : (index + 1) * count])
        coefficients += quartic(0.5 * (products - own))
    return stages, coefficients


def _blended(stages: Stages, step: float, pool: Map) -> list[list[Tensor]]:
    def blend(parts: list[Tensor]) -> Tensor:
        if step == 1:
            return parts[-1]
        shares = [1 - step, step] if len(parts) == 2 else [(1 - step) ** 2, step * (1 - step), step**2]
        result = parts[0] * shares[0]
        for part, share in zip(parts[1:], shares[1:], strict=True):
            result.add_(part, alpha=share)
        return result

    return [pool(blend, models) for models in stages]


def quartic(products: np.ndarray) -> np.ndarray:
    """
    Coefficients of `phi(t)^T products phi(t)`, constant first, with `phi = (1-t, t)` for two rows of `products` and
    `((1-t)^2, t(1-t), t^2)` for three.
    """
    basis = [[1, -1], [0, 1]] if len(products) == 2 else [[1, -2, 1], [0, 1, -1], [0, 0, 1]]
    result = np.zeros(5)
    for left, row in zip(basis, products, strict=True):
        for right, value in zip(basis, row, strict=True):
            term = np.convolve(left, right) * value
            result[: len(term)] += term
    return result


def best_step(coefficients: np.ndarray) -> tuple[float, float]:
    """
    The maximum of a quartic over [0, 1]: among 0, 1 and the stationary points between.

    Args:
        coefficients (`np.ndarray` of shape `(5,)`): constant first.

    Returns:
        `tuple[float, float]`: where, and the gain over t = 0.
    """
    roots = np.polynomial.polynomial.polyroots(np.polynomial.polynomial.polyder(coefficients))
    inside = [float(root.real) for root in roots if abs(root.imag) < 1e-9 and 0 < root.real < 1]
    gains = {
        step: float(np.polynomial.polynomial.polyval(step, coefficients) - coefficients[0])
        for step in (0.0, *inside, 1.0)
    }
    step = max(gains, key=lambda place: gains[place])
    return step, gains[step]
