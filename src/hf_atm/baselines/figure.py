"""The picture of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any


_MARKS = "osD^vPX*<>"


def draw(cells: Mapping[int, Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Average validation score by optimizer steps per task: mean over seeds, and the range between them.

    Members with a curve are lines; those without one (experts, the best one-shot merge) are level lines.

    Args:
        cells (`Mapping[int, Mapping]`): results by seed and member.
        rows (`Mapping[str, Mapping]`): from [`summarize`].
        path (`Path`): a PNG file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    members = list(dict.fromkeys(member for by_member in cells.values() for member in by_member))
    for index, member in enumerate(members):
        points: dict[float, list[float]] = {}
        for by_member in cells.values():
            for entry in by_member.get(member, {}).get("curve", []):
                points.setdefault(entry["steps"], []).append(statistics.fmean(entry["scores"].values()))
        if member not in rows or not points:
            continue
        steps = sorted(points)
        means = [statistics.fmean(points[step]) for step in steps]
        line = axes.plot(steps, means, marker=_MARKS[index % len(_MARKS)], markersize=5, label=member)[0]
        low, high = [min(points[s]) for s in steps], [max(points[s]) for s in steps]
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    levels = {name: row for name, row in rows.items() if name.startswith("one-shot") and "validation" in row}
    best = max(levels, key=lambda name: levels[name]["validation"]["average"]["mean"], default="")
    for name, style in (("experts", "--"), (best, ":")):
        if name in rows and "validation" in rows[name]:
            axes.axhline(
                rows[name]["validation"]["average"]["mean"], linestyle=style, color="black", linewidth=1, label=name
            )
    axes.set_xlabel("optimizer steps per task")
    axes.set_ylabel("average of the tasks' metrics, validation")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    beside = path.with_name(f"{path.stem}.tmp{path.suffix}")
    figure.savefig(beside, dpi=150)
    pyplot.close(figure)
    beside.replace(path)
