"""Line search of the outer step on validation losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


def search_step(
    losses_at: Callable[[float], Mapping[str, float]], start: float, factor: float = math.sqrt(2), most: int = 4
) -> tuple[float, dict[float, float]]:
    """The step size with the least mean validation loss, walking from `start` in steps of `factor`.

    The walk goes up first, then down if up was no better, and stops when a step is no better or `most` have been
    taken. Losses count relative to those at `start`, so that no task's units dominate.

    Args:
        losses_at (`Callable[[float], Mapping[str, float]]`): loss of every task at a step size.
        start (`float`): first step size, above 0.
        factor (`float`, *optional*, defaults to the square root of 2): ratio of neighbouring step sizes.
        most (`int`, *optional*, defaults to 4): steps of the walk in one direction.

    Returns:
        `tuple[float, dict[float, float]]`: the best step size, and the relative loss at each one that was tried
        (1 at `start`; infinite where a loss is not finite).
    """
    reference: dict[str, float] = {}
    tried: dict[float, float] = {}

    def relative(step: float) -> float:
        losses = losses_at(step)
        tried[step] = math.inf
        if all(math.isfinite(loss) for loss in losses.values()):
            reference.update({task: loss for task, loss in losses.items() if task not in reference})
            ratios = [loss / max(reference[task], 1e-12) for task, loss in losses.items()]
            tried[step] = math.fsum(ratios) / len(ratios)
        return tried[step]

    best = start
    # Where even the first step leads nowhere, only shorter ones can help.
    directions = (factor, 1 / factor) if math.isfinite(relative(start)) else (1 / factor,)
    for ratio in directions:
        step = start
        for _ in range(most):
            step *= ratio
            if relative(step) >= tried[best] and math.isfinite(tried[best]):
                break
            best = step
        if best != start:
            break
    return best, tried
