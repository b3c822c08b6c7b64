"""A run's scores by round."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import MARKS, STYLES, canvas


def draw_rounds(
    records: Sequence[Mapping[str, Any]],
    target: str | os.PathLike,
    levels: Mapping[str, float] | None = None,
) -> bool:
    """
    Score of every task and their average after each merge, with the experts of each round where they were evaluated.

    Args:
        records (`Sequence[Mapping]`):
            `trainer.report`, or `rounds` of `atm_report.json`.
        target (`str` or `os.PathLike`):
            See [`canvas`].
        levels (`Mapping[str, float]`, *optional*):
            Averages to compare with, as level lines: joint training, a one-shot merge, one expert per task.

    Returns:
        `bool`: `False`, and no picture, when no round was evaluated.
    """
    scored = [record for record in records if record["scores"]]
    if not scored:
        return False
    tasks = scored[-1]["tasks"]
    names = {record["metric_names"].get(task) for record in scored for task in tasks}
    with canvas(target) as (_, axes):
        for index, task in enumerate(tasks):
            points = [(record["round"] + 1, record["scores"].get(task)) for record in scored]
            known = [(x, y) for x, y in points if y is not None]
            axes.plot(
                *zip(*known, strict=True),
                STYLES[1 + index % 3],
                marker=MARKS[index % len(MARKS)],
                markersize=4,
                linewidth=1,
                label=task,
            )
        rounds = [record["round"] + 1 for record in scored]
        axes.plot(rounds, [_mean(record["scores"]) for record in scored], "k-", linewidth=2.5, label="average, merged")
        experts = [(r["round"] + 1, _mean(r["expert_scores"])) for r in scored if r.get("expert_scores")]
        if experts:
            axes.plot(*zip(*experts, strict=True), "k:", marker="|", markersize=8, label="average, round's experts")
        for index, (name, level) in enumerate((levels or {}).items()):
            axes.axhline(level, color="0.45", linestyle=STYLES[1 + index % 3], linewidth=1)
            axes.annotate(
                name,
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 2),
                textcoords="offset points",
                ha="right",
                fontsize="small",
                color="0.3",
            )
        axes.set_xlabel("round")
        axes.set_ylabel(f"{names.pop()}, validation" if len(names) == 1 else "each task's first metric, validation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
