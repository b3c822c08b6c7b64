"""A trainer that takes a model as it is, to score it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .loop import ATMLoop
from .trainer import ATMTrainer


class _ScoringLoop(ATMLoop):
    """What the model is scored on, given as training data, must not become prototypes."""

    def _as_read(self, datasets: Mapping[str, Any]) -> dict[str, Any]:
        return dict(sorted(datasets.items()))


class Scorer(ATMTrainer):
    """An [`ATMTrainer`] that only evaluates: `train_dataset` may be the data to score on, and heads stay as they are."""

    loop_class = _ScoringLoop
