"""How task vectors lie to each other."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from .canvas import MARKS, STYLES, canvas


def draw_cosines(cosines: Mapping[str, Mapping[str, float]], target: str | os.PathLike) -> None:
    """
    Cosines between task vectors as a map, each number written into its field.

    Args:
        cosines (`Mapping[str, Mapping[str, float]]`):
            By task and task, in [-1, 1].
        target (`str` or `os.PathLike`):
            See [`canvas`].
    """
    tasks = list(cosines)
    values = [[cosines[a][b] for b in tasks] for a in tasks]
    others = [abs(values[i][j]) for i in range(len(tasks)) for j in range(len(tasks)) if i != j]
    # The diagonal is one by definition and would wash out everything else.
    limit = max([*others, 0.05])
    side = max(4.0, 0.75 * len(tasks) + 2)
    with canvas(target, (side + 1, side)) as (figure, axes):
        image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                dark = abs(value) > 0.6 * limit
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        axes.set_yticks(range(len(tasks)), tasks)
        figure.colorbar(image, label="cosine between task vectors", shrink=0.8, extend="max")


def draw_interference(layers: Mapping[str, Mapping[str, Any]], target: str | os.PathLike) -> bool:
    """
    Singular task interference of every matrix, by depth: one line per kind of matrix.

    Args:
        layers (`Mapping[str, Mapping]`):
            `layers` of a [`Diagnosis`] as a dictionary.
        target (`str` or `os.PathLike`):
            See [`canvas`].

    Returns:
        `bool`: `False`, and no picture, when no matrix was looked at.
    """
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, layer in layers.items():
        if layer.get("interference") is not None:
            kind, depth = _kind_and_depth(name)
            total = sum(layer["norms"].values())
            kinds.setdefault(kind, []).append((depth, layer["interference"] / total if total else 0.0))
    if not kinds:
        return False
    with canvas(target, (9.0, 5.0)) as (_, axes):
        for index, (kind, points) in enumerate(sorted(kinds.items())):
            axes.plot(
                *zip(*sorted(points), strict=True),
                STYLES[index // len(MARKS) % len(STYLES)],
                marker=MARKS[index % len(MARKS)],
                markersize=5,
                linewidth=1,
                label=kind,
            )
        axes.set_xlabel("layer")
        axes.set_ylabel("singular task interference / sum of the tasks' norms")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _kind_and_depth(name: str) -> tuple[str, int]:
    """`encoder.layer.3.attention.query.weight` is `encoder.layer.*.attention.query`, at depth 3; without a number, 0."""
    found = re.search(r"\.(\d+)\.", name)
    depth = int(found.group(1)) if found else 0
    kind = name.removesuffix(".weight")
    return (kind[: found.start()] + ".*." + kind[found.end() :] if found else kind), depth
