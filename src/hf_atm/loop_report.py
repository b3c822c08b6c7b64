"""What the loop tells logs, trackers and `atm_report.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .checkpoint import REPORT_NAME, write_json


class LoopReport:
    """The part of the loop that reports; see [`ATMLoop`]."""

    args: Any
    trainer: Any
    plan: Any
    groups: Any
    records: list[dict[str, Any]]
    seconds: dict[str, float]
    segment_loss: list[float]
    round_losses: dict[str, float]
    _last_logged: int

    def describe(self, logs: dict[str, float], step: int) -> None:
        """Add round, task and the task's own loss to a training log, and remember the loss for the report."""
        position = self.plan.locate(step - 1)
        logs["round"] = position.round
        logs["task"] = self.plan.tasks.index(position.task)
        logs[f"loss_{position.task}"] = logs["loss"]
        steps, self._last_logged = step - self._last_logged, step
        self.segment_loss[0] += logs["loss"] * steps
        self.segment_loss[1] += steps
        if self.plan.closed_by(step) is not None:
            if not position.settling:
                # The record of a finished round holds this very dictionary.
                self.round_losses[position.task] = self.segment_loss[0] / self.segment_loss[1]
            self.segment_loss = [0.0, 0.0]

    def attach_metrics(self, state: Any, metrics: Mapping[str, float]) -> bool:
        """Put an evaluation of merged weights into the round's record; `False` when it belongs to none."""
        if not self.records or not self.trainer.is_in_train:
            return False
        record = self.records[-1]
        if record["global_step"] != state.global_step or "eval_loss" not in metrics:
            return False
        record["metrics"] = {name: value for name, value in metrics.items() if name != "epoch"}
        record["scores"], record["metric_names"] = self.trainer.scores(metrics)
        # An evaluation at a round's end comes after its record was made.
        record["seconds"]["evaluating"] += self.seconds["evaluating"]
        self.seconds["evaluating"] = 0.0
        return True

    def write_report(self) -> None:
        """Write `atm_report.json`."""
        private = self.groups.private_sizes(self.plan.tasks)
        content = {"rounds": self.records, "private_parameters": private}
        write_json(os.path.join(self.args.output_dir, REPORT_NAME), content)
