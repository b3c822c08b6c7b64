"""Models side by side, task by task."""

from __future__ import annotations

import os
from collections.abc import Mapping

from .canvas import HATCHES, canvas


# A share of less than this says nothing.
LEAST = 0.05


def draw_scores(
    rows: Mapping[str, Mapping[str, float]], target: str | os.PathLike, reference: str = "experts"
) -> bool:
    """
    Bars of every model's score per task; with a reference, as a share of its score.

    Args:
        rows (`Mapping[str, Mapping[str, float]]`):
            Score by model and task. A task whose reference is below 0.05, at chance, is left out.
        target (`str` or `os.PathLike`):
            See [`canvas`].
        reference (`str`, *optional*, defaults to `"experts"`):
            The row that is 1; scores stay as they are when there is none of that name.

    Returns:
        `bool`: `False`, and no picture, when nothing is left to draw.
    """
    whole = rows.get(reference)
    tasks = [task for task in next(iter(rows.values()), {}) if whole is None or whole.get(task, 0.0) >= LEAST]
    shown = {name: scores for name, scores in rows.items() if name != reference}
    if not tasks or not shown:
        return False
    width = 0.8 / len(shown)
    with canvas(target, (max(6.0, 1.1 * len(tasks) + 2.5), 4.5)) as (_, axes):
        for index, (name, scores) in enumerate(shown.items()):
            places = [place + (index - (len(shown) - 1) / 2) * width for place in range(len(tasks))]
            heights = [scores.get(task, 0.0) / (1.0 if whole is None else whole[task]) for task in tasks]
            grey = 0.95 - 0.6 * index / max(1, len(shown) - 1)
            axes.bar(
                places,
                heights,
                width,
                label=name,
                color=str(grey),
                edgecolor="black",
                hatch=HATCHES[index % len(HATCHES)],
            )
        if whole is not None:
            axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_ylabel("score" if whole is None else f"score / score of {reference}")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=4)
    return True
