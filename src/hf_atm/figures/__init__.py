"""Pictures of runs, task vectors and losses: PNG and SVG, readable in greyscale. Needs matplotlib only when drawing."""

from __future__ import annotations

from .geometry import draw_cosines, draw_interference
from .landscape import draw_landscape
from .rounds import draw_rounds
from .scores import draw_scores


__all__ = ["draw_cosines", "draw_interference", "draw_landscape", "draw_rounds", "draw_scores"]
