"""Continual ATM: tasks that arrive over time."""

from __future__ import annotations

from .archive import TaskVectorArchive
from .consolidation import Consolidation, ElasticWeightConsolidation
from .replay import replay_sample
from .settings import ContinualSettings, check_stages
from .stages import ContinualRun, Stage, run_stages
from .suite import ContinualSuite
from .transfer import Transfer, transfer


__all__ = [
    "Consolidation",
    "ContinualRun",
    "ContinualSettings",
    "ContinualSuite",
    "ElasticWeightConsolidation",
    "Stage",
    "TaskVectorArchive",
    "Transfer",
    "check_stages",
    "replay_sample",
    "run_stages",
    "transfer",
]
