"""What learning a task does to the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Transfer:
    """Figures of a sequence of stages (https://huggingface.co/papers/1706.08840).

    Args:
        average (`float`): mean score over all tasks after the last stage.
        backward (`float` or `None`): mean over earlier tasks of the last score minus the one right after the task was
            learned; negative is forgetting. `None` with one stage.
        forgetting (`float` or `None`): mean over earlier tasks of the best score so far minus the last one, at least 0.
        forward (`float` or `None`): mean over later tasks of the score right after the task was learned minus that of
            a model tuned on it alone from the start; `None` without such references.
    """

    average: float
    backward: float | None
    forgetting: float | None
    forward: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return dict(vars(self))


def transfer(
    scores: Sequence[Mapping[str, float]],
    stages: Sequence[Sequence[str]],
    references: Mapping[str, float] | None = None,
) -> Transfer:
    """Backward and forward transfer from the scores after each stage.

    Args:
        scores (`Sequence[Mapping[str, float]]`): for each stage, scores of all tasks known by then.
        stages (`Sequence[Sequence[str]]`): for each stage, the tasks that were new in it.
        references (`Mapping[str, float]`, *optional*): scores of models tuned on one task alone.
    """
    last = scores[-1]
    arrival = {task: index for index, tasks in enumerate(stages[: len(scores)]) for task in tasks}
    # A task that some rows lack (no test split, for instance) has no history.
    arrival = {task: index for task, index in arrival.items() if all(task in row for row in scores[index:])}
    earlier = [task for task, index in arrival.items() if index < len(scores) - 1]
    later = [task for task, index in arrival.items() if index > 0 and task in (references or {})]
    best = {task: max(row[task] for row in scores[arrival[task] :]) for task in earlier}
    return Transfer(
        average=statistics.fmean(last.values()),
        backward=_mean([last[task] - scores[arrival[task]][task] for task in earlier]),
        forgetting=_mean([best[task] - last[task] for task in earlier]),
        forward=_mean([scores[arrival[task]][task] - (references or {})[task] for task in later]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
