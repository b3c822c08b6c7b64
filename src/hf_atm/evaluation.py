"""Metric functions by task, and one set of scores out of all tasks' evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

from torch.utils.data import Dataset

from .data import TaskDataset
from .episodic import refresh_tasks
from .seeding import isolated_rng


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


class EvaluationMixin:
    """Evaluation and prediction by task, for a trainer whose loop is in `self.atm`."""

    atm: Any
    args: Any
    state: Any

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate every task with its own head, collator and metrics; one log and one `on_evaluate` for all.

        Args:
            eval_dataset (`dict[str, Dataset]` or `TaskDataset`, *optional*): instead of the one given at
                construction; may hold some of the tasks.
            ignore_keys, metric_key_prefix, gen_kwargs: as the host takes them.

        Returns:
            `dict[str, float]`: `<prefix>_<task>_<metric>`, `<prefix>_<task>_loss`, `<prefix>_loss` (mean over tasks),
            `<prefix>_average` and `<prefix>_worst` (of each task's first metric), `<prefix>_runtime` in seconds.
        """
        host: Any = self
        sets = host.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, str):
            sets = {sets: (host.eval_dataset or {}).get(sets, [])}
        elif isinstance(sets, TaskDataset):
            sets = {sets.task: sets}
        if not isinstance(sets, Mapping):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)  # type: ignore[misc]
        unknown = sorted(set(sets) - set(self.atm.plan.tasks))
        if unknown:
            raise KeyError(f"eval_dataset names unknown tasks {unknown}; the tasks are {list(self.atm.plan.tasks)}.")
        started = perf_counter()
        metrics: dict[str, float] = {}
        for task in sorted(sets):
            metrics |= self._score(task, sets[task], ignore_keys, metric_key_prefix, **gen_kwargs)
        metrics |= aggregate(metrics, metric_key_prefix, sorted(sets), self._primary())
        metrics[f"{metric_key_prefix}_runtime"] = round(perf_counter() - started, 4)
        host.log(metrics)
        host.control = host.callback_handler.on_evaluate(self.args, self.state, host.control, metrics)
        return metrics

    def _score(
        self, task: str, dataset: Any, ignore_keys: list[str] | None, prefix: str, **gen_kwargs: Any
    ) -> dict[str, float]:
        """One task's metrics, silently: no callback, no log entry, no random number used up."""
        host: Any = self
        held = host.eval_dataset
        if host.data_collator.by_task or isinstance(dataset, TaskDataset):
            # By name, since some hosts would prepare a data set a second time.
            host.eval_dataset, dataset = {**(held or {}), task: host._as_task(task, dataset)}, task
        handler, history = host.callback_handler, self.state.log_history
        callbacks, length, started = handler.callbacks, len(history), perf_counter()
        training = host.model.training
        handler.callbacks, self.atm.scoring = [], True
        if host.compute_metrics is not None:
            host.compute_metrics.task = task
        try:
            # Of the weights as they are: merged ones, an expert's, or those of a trial step.
            refresh_tasks(self, [task])
            with isolated_rng():
                result = super().evaluate(dataset, ignore_keys, f"{prefix}_{task}", **gen_kwargs)  # type: ignore[misc]
            logged = {name: value for entry in history[length:] for name, value in entry.items()}
        finally:
            handler.callbacks, self.atm.scoring, host.eval_dataset = callbacks, False, held
            if host.compute_metrics is not None:
                host.compute_metrics.task = None
            del history[length:]
            # A host that logs by mode must find the mode it left.
            host.model.train(training)
            self.atm.count_evaluation(perf_counter() - started)
        return task_metrics({**logged, **result}, prefix, task)

    def _primary(self) -> dict[str, str]:
        metrics = getattr(self, "compute_metrics", None)
        return {} if metrics is None else metrics.primary

    def scores(self, metrics: Mapping[str, float], prefix: str = "eval") -> tuple[dict[str, float], dict[str, str]]:
        """Each task's first metric in the result of `evaluate`: values and names by task."""
        return scores_of(metrics, prefix, list(self.atm.plan.tasks), self._primary())

    def validation_losses(self, tasks: Sequence[str]) -> dict[str, float]:
        """Validation loss of the live model on each of `tasks`; nothing is logged."""
        host: Any = self
        return {task: self._score(task, host.eval_dataset[task], None, "eval")[f"eval_{task}_loss"] for task in tasks}

    def quiet_scores(self, sets: Mapping[str, Any]) -> dict[str, float]:
        """Each task's first metric on `sets` with the live model; nothing is logged."""
        metrics: dict[str, float] = {}
        for task, dataset in sets.items():
            metrics |= self._score(task, dataset, None, "eval")
        return self.scores(metrics)[0]

    def evaluate_expert(self, task: str) -> tuple[dict[str, float], float | None]:
        """Metrics of the model as it is on one task, and the first of them."""
        host: Any = self
        metrics = self._score(task, host.eval_dataset[task], None, "eval")
        scores, _ = self.scores(metrics)
        own = len(f"eval_{task}_")
        return {name[own:]: value for name, value in metrics.items()}, scores.get(task)

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        """As the host's; a [`TaskDataset`] says which task's head, collator and metrics apply."""
        metrics = getattr(self, "compute_metrics", None)
        if isinstance(test_dataset, TaskDataset):
            refresh_tasks(self, [test_dataset.task])
        if metrics is None:
            return super().predict(test_dataset, *args, **kwargs)  # type: ignore[misc]
        metrics.task = getattr(test_dataset, "task", None)
        try:
            return super().predict(test_dataset, *args, **kwargs)  # type: ignore[misc]
        finally:
            metrics.task = None
