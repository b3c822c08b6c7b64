"""What the loop tells logs, trackers and `atm_report.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .analysis.conditions import size_loss_covariance
from .checkpoint import REPORT_NAME, write_json
from .run_facts import run_facts


class LoopReport:
    """The part of the loop that reports; see [`ATMLoop`]."""

    args: Any
    trainer: Any
    plan: Any
    groups: Any
    num_examples: dict[str, int]
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
        if self.args.diagnostics != "off" and "diagnostics" in record:
            record["diagnostics"] |= self._loss_diagnostics(record, metrics)
        # An evaluation at a round's end comes after its record was made.
        record["seconds"]["evaluating"] += self.seconds["evaluating"]
        self.seconds["evaluating"] = 0.0
        return True

    def _loss_diagnostics(self, record: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
        """What the evaluation of the merged model tells beside the scores: see `docs/diagnostics.md`."""
        losses = {task: metrics[f"eval_{task}_loss"] for task in self.plan.tasks if f"eval_{task}_loss" in metrics}
        experts = {task: values["loss"] for task, values in (record["experts"] or {}).items() if "loss" in values}
        result: dict[str, Any] = {"size_loss_covariance": size_loss_covariance(self.num_examples, losses)}
        if experts:
            result["gap_to_experts"] = {task: losses[task] - experts[task] for task in losses if task in experts}
        return result

    def write_report(self) -> None:
        """Write `atm_report.json`."""
        private = self.groups.private_sizes(self.plan.tasks)
        content = {"rounds": self.records, "private_parameters": private, "run": run_facts(self.trainer)}
        write_json(os.path.join(self.args.output_dir, REPORT_NAME), content)


def round_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's diagnostics as single numbers, for logs and trackers.

    Args:
        record (`Mapping`): one entry of `trainer.report`.
    """
    tasks, diagnostics = record["tasks"], record["diagnostics"]
    pairs = [record["cosines"][a][b] for index, a in enumerate(tasks) for b in tasks[index + 1 :]]
    norms = record["task_vector_norms"].values()
    scalars = {"merged_norm": record["merged_norm"], "step_size": record["step_size"]}
    if pairs:
        scalars |= {"cosine_mean": sum(pairs) / len(pairs), "cosine_min": min(pairs)}
    if min(norms) > 0:
        scalars["norm_dispersion"] = max(norms) / min(norms)
    for name in ("drift", "drift_from_start", "outer_persistence"):
        if diagnostics.get(name) is not None:
            scalars[name] = diagnostics[name]
    for name in ("gradient_cosines", "gradient_distances", "barriers"):
        if diagnostics.get(name):
            scalars[f"{name}_mean"] = sum(diagnostics[name].values()) / len(diagnostics[name])
    for name in ("sign_overlap", "sign_conflict", "interference", "effective_rank"):
        value = diagnostics.get("task_vectors", {}).get(name)
        if value is not None:
            scalars[name] = value
    return {f"atm_{name}": value for name, value in scalars.items()}
