"""Metric functions by task, and one set of scores out of all tasks' evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


class TaskMetrics:
    """The `compute_metrics` that the Trainer sees: hands predictions to the active task's own function.

    Args:
        functions (`Callable` or `Mapping[str, Callable]`): one function for all tasks, or one per task.

    Attributes:
        task: the task being evaluated.
        primary: name of the first metric each task returned, the one that averages are made of.
    """

    def __init__(self, functions: Callable | Mapping[str, Callable]) -> None:
        self.functions = functions
        self.task: str | None = None
        self.primary: dict[str, str] = {}

    def __call__(self, prediction: Any) -> dict[str, float]:
        if not isinstance(self.functions, Mapping):
            result = self.functions(prediction)
        elif self.task is None:
            raise ValueError(
                "compute_metrics is per task, and this data set names none; wrap it as hf_atm.TaskDataset(dataset, "
                "task)."
            )
        else:
            result = self.functions[self.task](prediction)
        if self.task is not None and result:
            self.primary[self.task] = next(iter(result))
        return result


def task_metrics(logged: Mapping[str, Any], prefix: str, task: str) -> dict[str, float]:
    """One task's evaluation, every key of the form `<prefix>_<task>_<metric>`.

    Hosts log some metrics under `<prefix>_<metric>` whatever the data set; those are the task's too. Speeds of single
    tasks are left out.
    """
    own, result = f"{prefix}_{task}_", {}
    for name, value in logged.items():
        if name in ("epoch", "step") or not isinstance(value, (int, float)):
            continue
        metric = name[len(own) :] if name.startswith(own) else name.removeprefix(f"{prefix}_")
        if metric not in _SPEED:
            result[own + metric] = value
    return result


def aggregate(
    metrics: Mapping[str, float], prefix: str, tasks: list[str], primary: Mapping[str, str]
) -> dict[str, float]:
    """Figures over all tasks: `<prefix>_loss`, and with metrics `<prefix>_average` and `<prefix>_worst`."""
    result = {}
    losses = [metrics[f"{prefix}_{task}_loss"] for task in tasks if f"{prefix}_{task}_loss" in metrics]
    if losses:
        result[f"{prefix}_loss"] = sum(losses) / len(losses)
    scores, _ = scores_of(metrics, prefix, tasks, primary)
    if scores:
        result[f"{prefix}_average"] = sum(scores.values()) / len(scores)
        result[f"{prefix}_worst"] = min(scores.values())
    return result


def scores_of(
    metrics: Mapping[str, float], prefix: str, tasks: list[str], primary: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Each task's first metric, as value and name."""
    names = {task: primary[task] for task in tasks if f"{prefix}_{task}_{primary.get(task)}" in metrics}
    return {task: metrics[f"{prefix}_{task}_{name}"] for task, name in names.items()}, names
