"""Ground of all pictures: readable without colour, saved whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


MARKS = "osD^vPX*<>"
STYLES = ("-", "--", "-.", ":")
#: Patterns that tell bars apart in print.
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")


@contextmanager
def canvas(target: str | os.PathLike, size: tuple[float, float] = (8.0, 5.0)) -> Iterator[tuple[Any, Any]]:
    """
    A figure with one pair of axes, saved when the block ends.

    Args:
        target (`str` or `os.PathLike`):
            With a suffix, such as `.png`, one file; without one, both a PNG and an SVG.
        size (`tuple[float, float]`, *optional*, defaults to `(8.0, 5.0)`):
            Inches.

    Raises:
        `OSError`: naming the folder, when nothing can be written there.
    """
    # Without a display, and without touching the backend of a notebook.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, figure.add_subplot()
    path = Path(target)
    for final in [path] if path.suffix else [path.with_suffix(".png"), path.with_suffix(".svg")]:
        _save(figure, final)


def _save(figure: Any, final: Path) -> None:
    import matplotlib

    beside = final.with_name(f"{final.stem}.tmp{final.suffix}")
    # No date and no random ids: the same numbers give the same file.
    metadata = {"Date": None} if final.suffix == ".svg" else {"Software": None}
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "hf-atm", "svg.fonttype": "none"}):
            figure.savefig(beside, dpi=150, metadata=metadata)
    except OSError as error:
        raise OSError(f"The picture {str(final)!r} cannot be written: {error.strerror or error}.") from error
    beside.replace(final)
