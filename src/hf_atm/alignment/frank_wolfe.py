"""Frank-Wolfe over all models and groups at once, with an exact line search (C2M3, arXiv 2405.17897)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .assignment import best_permutation
from .mixture import Mixture
from .problem import Problem, column_scores, gram, reorder, row_scores, total
from .workers import Map


@dataclass
class Climb:
    """
    What a run of Frank-Wolfe did.

    Args:
        values (`list[float]`): objective before every iteration and after the last.
        gap (`float`): the last Frank-Wolfe gap: no point is better by more, in the relaxed problem's linear model.
        converged (`bool`): whether the gap or the gain fell below the tolerance before the iterations ran out.
    """

    values: list[float] = field(default_factory=list)
    gap: float = float("inf")
    converged: bool = False


def climb(point: Mixture, pool: Map, max_iter: int = 200, tol: float = 1e-6, fixed: Collection[int] = ()) -> Climb:
    """
    Climbs from a point, which is moved, to a stationary one.

    Args:
        point ([`Mixture`]): where to start.
        pool (`Callable`): map over threads, see [`workers`].
        max_iter (`int`, *optional*, defaults to 200): iterations at most.
        tol (`float`, *optional*, defaults to 1e-6): stops when gap or gain fall below this share of the objective.
        fixed (`Collection[int]`, *optional*): models that stay in their own order.

    Returns:
        [`Climb`]
    """
    result = Climb()
    problem = point.problem
    free = [model for model in range(problem.count) if model not in fixed]
    for _ in range(max_iter):
        scores, along = gradients(point, pool)
        value = 0.5 * float(along.sum())
        result.values.append(value)
        direction, best = _oracle(problem, scores, free, pool)
        # <G, P> needs no P: every permuted axis of a block contributes the block's own inner product.
        axes = np.array([1.0 if block.columns is None else 2.0 for block in problem.blocks])
        result.gap = best - float((axes[:, None] * along)[:, free].sum())
        if result.gap <= tol * abs(value):
            result.converged = True
            return result
        stages, line = _line(point, direction, pool)
        step, gain = best_step(line)
        if step == 0:
            break
        point.advance(step, direction, _blended(stages, step, pool), pool)
        if gain <= tol * abs(value):
            result.converged = True
            break
    result.values.append(value_of(point))
    return result


def value_of(point: Mixture) -> float:
    """The objective at a point, in float64."""
    return sum(0.5 * (gram([total(seen)])[0, 0] - sum(gram([matrix])[0, 0] for matrix in seen)) for seen in point.seen)


def gradients(point: Mixture, pool: Map) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """
    Gradients of the objective.

    Returns:
        `tuple[list[dict[str, np.ndarray]], np.ndarray]`: by model the gradient for every index vector; and the inner
        products of every model's blocks with the sum of the others', shape (blocks, models).
    """
    problem = point.problem
    sums = [total(seen) for seen in point.seen]

    def task(place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None, float]:
        index, model = place
        block, seen = problem.blocks[index], point.seen[index][model]
        others = sums[index] - seen
        rows = row_scores(point.right[index][model], others)
        columns = None if block.columns is None else column_scores(point.left[index][model], others)
        return rows, columns, float(gram([seen, others])[0, 1])

    places = [(index, model) for index in range(len(problem.blocks)) for model in range(problem.count)]
    scores = [{name: np.zeros((size, size)) for name, size in problem.sizes.items()} for _ in range(problem.count)]
    along = np.zeros((len(problem.blocks), problem.count))
    for (index, model), (rows, columns, product) in zip(places, pool(task, places), strict=True):
        block = problem.blocks[index]
        scores[model][block.rows] += rows
        if block.columns is not None:
            scores[model][block.columns] += columns
        along[index, model] = product
    return scores, along


def _oracle(
    problem: Problem, scores: Sequence[dict[str, np.ndarray]], free: Sequence[int], pool: Map
) -> tuple[list[dict[str, np.ndarray]], float]:
    places = [(name, model) for model in free for name in problem.groups]
    found = pool(lambda place: best_permutation(place[0], problem.groups[place[0]], scores[place[1]]), places)
    direction = [problem.identity() for _ in range(problem.count)]
    for (_, model), (vectors, _) in zip(places, found, strict=True):
        direction[model].update(vectors)
    return direction, sum(value for _, value in found)


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
