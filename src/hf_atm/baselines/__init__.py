"""What ATM has to be held against, through the same trainer and the same data."""

from __future__ import annotations

from .cells import Suite
from .compare import compare
from .joint import JointTrainer
from .members import Member, parse_members
from .one_shot import METHODS, OneShotMerges
from .presets import BASELINES, Baseline, get_baseline


__all__ = [
    "BASELINES",
    "METHODS",
    "Baseline",
    "JointTrainer",
    "Member",
    "OneShotMerges",
    "Suite",
    "compare",
    "get_baseline",
    "parse_members",
]
