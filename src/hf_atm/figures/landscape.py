"""A loss landscape from above."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..analysis.landscape import Landscape
from .canvas import canvas


def draw_landscape(
    landscape: Landscape, names: Sequence[str], target: str | os.PathLike, loss_name: str = "validation loss"
) -> None:
    """
    Contours of the loss over the plane of three models, the models themselves, and the path of the rounds.

    Args:
        landscape ([`Landscape`]):
            What was measured.
        names (`Sequence[str]`):
            Of the three models.
        target (`str` or `os.PathLike`):
            See [`canvas`].
        loss_name (`str`, *optional*):
            Which loss it is.
    """
    losses = np.array(landscape.losses)
    finite = losses[np.isfinite(losses)]
    # Far corners may be many times as high; equal steps in rank keep the valley readable.
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, 16)))
    with canvas(target, (7.5, 6.0)) as (figure, axes):
        if len(levels) > 1:
            filled = axes.contourf(landscape.x, landscape.y, losses, levels, cmap="Greys")
            axes.contour(landscape.x, landscape.y, losses, levels, colors="0.35", linewidths=0.5)
            figure.colorbar(filled, label=loss_name, format="%.3g")
        # One point is no path: it is the merged model.
        if len(landscape.path) > 1:
            xs, ys = [place[0] for place in landscape.path], [place[1] for place in landscape.path]
            axes.plot(xs, ys, "-", color="tab:orange", linewidth=1.5, zorder=3)
            axes.plot(xs, ys, "o", color="tab:orange", markeredgecolor="black", markersize=5, zorder=3, label="rounds")
        marks = zip(landscape.corners, landscape.corner_losses, names, "s^D", strict=True)
        for (x, y), loss, name, mark in marks:
            axes.plot(
                x,
                y,
                mark,
                color="white",
                markeredgecolor="black",
                markersize=10,
                zorder=4,
                label=f"{name} ({loss:.3f})",
            )
        axes.set_xlabel(f"L2 distance from {names[0]} towards {names[1]}")
        axes.set_ylabel("L2 distance, at a right angle")
        ratio = (landscape.x[-1] - landscape.x[0]) / (landscape.y[-1] - landscape.y[0])
        # True angles, unless they would leave a ribbon.
        axes.set_aspect("equal" if 0.4 < ratio < 2.5 else "auto")
        figure.legend(fontsize="small", loc="outside lower center", ncols=4)
