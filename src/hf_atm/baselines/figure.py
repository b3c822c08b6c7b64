"""The picture of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figures.canvas import MARKS, STYLES, canvas


def draw(cells: Mapping[int, Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Average validation score by optimizer steps per task: mean over seeds, and the range between them.

    Members with a curve are lines; those without one (experts, the best one-shot merge) are level lines. Where no
    member was evaluated round by round, final averages are bars.

    Args:
        cells (`Mapping[int, Mapping]`): results by seed and member.
        rows (`Mapping[str, Mapping]`): from [`summarize`].
        path (`Path`): a PNG file.
    """
    curves = _curves(cells)
    with canvas(path, (9, 5.5)) as (_, axes):
        if any(len(points) > 1 for points in curves.values()):
            _draw_curves(axes, curves, rows)
        else:
            _draw_bars(axes, rows)
        axes.grid(alpha=0.3)


def _curves(cells: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Average scores of all seeds by steps, for every member."""
    curves: dict[str, dict[float, list[float]]] = {}
    for by_member in cells.values():
        for member, cell in by_member.items():
            points = curves.setdefault(member, {})
            for entry in cell["curve"]:
                points.setdefault(entry["steps"], []).append(statistics.fmean(entry["scores"].values()))
    return curves


def _draw_curves(axes: Any, curves: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    for index, (member, points) in enumerate(curves.items()):
        if member not in rows or not points:
            continue
        steps = sorted(points)
        means = [statistics.fmean(points[step]) for step in steps]
        style = STYLES[index // len(MARKS) % len(STYLES)]
        line = axes.plot(steps, means, style, marker=MARKS[index % len(MARKS)], markersize=5, label=member)[0]
        low, high = [min(points[s]) for s in steps], [max(points[s]) for s in steps]
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    levels = {name: row for name, row in rows.items() if name.startswith("one-shot") and "validation" in row}
    best = max(levels, key=lambda name: levels[name]["validation"]["average"]["mean"], default="")
    for name, style in (("experts", "--"), (best, ":")):
        if name in rows and "validation" in rows[name]:
            level = rows[name]["validation"]["average"]["mean"]
            axes.axhline(level, linestyle=style, color="black", linewidth=1, label=name)
    axes.set_xlabel("optimizer steps per task")
    axes.set_ylabel("average of the tasks' metrics, validation")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_bars(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    shown = {name: row["validation"]["average"] for name, row in rows.items() if "validation" in row}
    names = sorted(shown, key=lambda name: shown[name]["mean"])
    means, deviations = [shown[name]["mean"] for name in names], [shown[name]["std"] for name in names]
    axes.barh(names, means, xerr=deviations, color="lightgrey", edgecolor="black", capsize=3)
    axes.set_xlabel("average of the tasks' metrics after the last step, validation (bar: mean, line: deviation)")
