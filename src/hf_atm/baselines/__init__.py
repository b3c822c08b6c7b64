"""What ATM has to be held against, through the same trainer and the same data."""

from __future__ import annotations

from .joint import JointTrainer


__all__ = ["JointTrainer"]
