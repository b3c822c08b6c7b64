"""What all stages of continual ATM share: model, data, settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..config import ATMConfig
from ..scoring import Scorer
from ..trainer import ATMTrainer


@dataclass
class ContinualSuite:
    """Model and data of a sequence of stages.

    Args:
        model: a [`MultiTaskModel`] with heads of the first stage's tasks at most, or a causal language model.
        heads (`Mapping[str, dict]`): specification of each task's head; empty for a language model.
        train, validation (`Mapping[str, Dataset]`): data of all tasks.
        args ([`ATMConfig`]): settings of every stage; its `output_dir` takes a folder per stage.
        test (`Mapping[str, Dataset]`, *optional*): scored after every stage.
        trainer_kwargs (`Mapping[str, Any]`, *optional*): what else [`ATMTrainer`] takes.
        identity (`Mapping[str, Any]`, *optional*): what else tells this model and data from others; finished stages of
            another one are refused.
        prepare (`Callable[[ATMTrainer], None]`, *optional*): done to every trainer before it runs.
    """

    model: Any
    heads: Mapping[str, dict[str, Any]]
    train: Mapping[str, Any]
    validation: Mapping[str, Any]
    args: ATMConfig
    test: Mapping[str, Any] = field(default_factory=dict)
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[ATMTrainer], None] = lambda trainer: None

    def trainer(
        self, model: Any, tasks: Sequence[str], train: Mapping[str, Any], args: ATMConfig, score: bool = False
    ) -> ATMTrainer:
        """A trainer over some of the tasks, with the suite's adapter; or one that scores the model as it is."""
        kwargs = dict(self.trainer_kwargs)
        if score:
            kwargs.pop("peft_config", None)
        if isinstance(args.task_weights, Mapping):
            args = with_changes(args, task_weights={task: args.task_weights[task] for task in tasks})
        for name, value in kwargs.items():
            if name in ("compute_metrics", "data_collator") and isinstance(value, Mapping):
                kwargs[name] = {task: value[task] for task in tasks}
        trainer = (Scorer if score else ATMTrainer)(
            model,
            args,
            train_dataset={task: train[task] for task in tasks},
            eval_dataset={task: self.validation[task] for task in tasks},
            **kwargs,
        )
        self.prepare(trainer)
        return trainer

    def add_heads(self, model: Any, tasks: Sequence[str]) -> None:
        """Heads for tasks that arrive, each decided by the seed and the task's name."""
        for task in tasks:
            if task in self.heads and task not in model.heads:
                model.add_task(task, self.heads[task], seed=self.args.seed)

    def score(self, model: Any, tasks: Sequence[str], run_dir: str) -> tuple[dict[str, float], dict[str, float]]:
        """Validation and test scores of a model, in the order of `tasks`."""
        neutral = {
            "local_steps": 1,
            "head_steps": 0,
            "full_batch": False,
            "dataloader_drop_last": False,
            "task_weights": "uniform",
            "outer_learning_rate": 1.0,
        }
        args = with_changes(self.args, output_dir=run_dir, **neutral)
        scorer = self.trainer(model, tasks, self.validation, args, score=True)
        validation = scorer.quiet_scores({task: self.validation[task] for task in tasks})
        test = scorer.quiet_scores({task: self.test[task] for task in tasks if task in self.test})
        return {task: validation[task] for task in tasks}, {task: test[task] for task in tasks if task in test}


def with_changes(args: ATMConfig, **changes: Any) -> ATMConfig:
    """A copy of the settings with some of them replaced."""
    return dataclasses.replace(args, **changes)


@contextmanager
def only_tasks(model: Any, tasks: Sequence[str]) -> Iterator[None]:
    """A [`MultiTaskModel`] without the heads of all other tasks, as long as the context lasts."""
    heads = getattr(model, "heads", None)
    if heads is None:
        yield
        return
    held, specs, order = dict(heads.items()), dict(model.config.tasks), model.config.task_order
    for task in set(held) - set(tasks):
        del heads[task]
    model.config.tasks = {task: spec for task, spec in specs.items() if task in tasks}
    model.config.task_order = list(model.config.tasks)
    try:
        yield
    finally:
        trained = dict(heads.items())
        for task in list(heads):
            del heads[task]
        for task, head in held.items():
            heads[task] = trained.get(task, head)
        model.config.tasks, model.config.task_order = specs, order
