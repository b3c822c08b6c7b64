"""Model cards that write themselves from what a run left behind."""

from __future__ import annotations

from .card import draw_pictures, render, write_card
from .facts import CardFacts, read_facts


__all__ = ["CardFacts", "draw_pictures", "read_facts", "render", "write_card"]
