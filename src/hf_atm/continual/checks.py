"""What a schedule needs, looked at for all stages before the first one runs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

from ..data import head_step_counts, segment_length
from ..episodic import check_episodes
from ..identity import require_one_process
from ..multi_task_config import normalize_task
from ..outer import task_weights
from .replay import check_replay
from .settings import ContinualSettings
from .stage_runs import stage_data
from .suite import ContinualSuite, only_tasks, with_changes


def check_run(suite: ContinualSuite, order: list[list[str]], settings: ContinualSettings) -> None:
    """Refuse what some stage would stumble over.

    Args:
        suite ([`ContinualSuite`]): model, data and settings.
        order (`list[list[str]]`): tasks by stage.
        settings ([`ContinualSettings`]): replay, consolidation, storage.

    Raises:
        ValueError: naming setting and way out.
    """
    require_one_process("A schedule")
    args = suite.args
    check_replay(suite.train, settings.replay)
    missing = [task for task in suite.train if task not in suite.validation]
    if missing:
        raise ValueError(f"task {missing[0]!r} has no validation data, by which stages are judged.")
    if suite.trainer_kwargs.get("compute_metrics") is None:
        raise ValueError("A schedule needs compute_metrics, whose first metric is a task's score.")
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub uploads what one run left, and a schedule leaves a model per stage; leave it out, and upload a "
            "finished stage with hf-atm push."
        )
    if args.full_batch:
        raise ValueError(
            "full_batch needs data sets of equal size, which a schedule with replay has not; turn it off."
        )
    peft = suite.trainer_kwargs.get("peft_config") is not None
    if peft and (settings.method == "opcm" or args.lora_merge_mode != "delta" or settings.ewc):
        raise ValueError(
            "Stages with an adapter need method 'atm' without ewc, and lora_merge_mode='delta', so that each stage ends "
            "with whole weights."
        )
    specs = {task: normalize_task(task, dict(spec)) for task, spec in suite.heads.items()}
    for task, spec in specs.items():
        check_episodes(task, spec, suite.train[task])
        if spec.get("head") == "prototypical" and settings.method == "opcm" and len(order) > 1:
            raise ValueError(
                f"Task {task!r} has a prototypical head, whose prototypes would stay those of an earlier model where no data "
                "are kept; use continual.method 'atm' with a replay, or leave head out."
            )
    weights = task_weights(args.task_weights or "uniform", {task: len(data) for task, data in suite.train.items()})
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for index, new in enumerate(order):
        train, replayed = stage_data(suite, settings, [task for tasks in order[:index] for task in tasks], new)
        for task in replayed:
            try:
                check_episodes(task, specs.get(task, {}), train[task])
            except ValueError as error:
                raise ValueError(f"replay={settings.replay} keeps too few examples, raise it: {error}") from None
        if not any(weights[task] for task in train):
            raise ValueError(f"All tasks of stage {index + 1} ({', '.join(train)}) have weight zero in task_weights.")
        lengths = {
            task: segment_length(
                task, len(data), batch, args.local_epochs, args.local_steps, args.dataloader_drop_last
            )
            for task, data in train.items()
        }
        head_step_counts(lengths, args.head_steps)
        _try_out(suite, settings, [task for tasks in order[: index + 1] for task in tasks], new, train, index + 1)


def _try_out(
    suite: ContinualSuite,
    settings: ContinualSettings,
    known: list[str],
    new: list[str],
    train: Mapping[str, Any],
    number: int,
) -> None:
    """Build a stage's trainer on a copy, since it knows best what it cannot do."""
    model, args = copy.deepcopy(suite.model), suite.args
    suite.add_heads(model, known)
    chosen = (args.metric_for_best_model or "").removeprefix("eval_") if args.load_best_model_at_end else ""
    absent = [task for task in suite.train if chosen.startswith(f"{task}_") and task not in train]
    if absent:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured in stage {number}, which has no data of "
            f"{absent[0]!r}; choose 'average', or a replay above 0."
        )
    tasks = list(train) if settings.method == "atm" else new
    with tempfile.TemporaryDirectory() as scratch, only_tasks(model, tasks):
        suite.trainer(model, tasks, train, with_changes(args, output_dir=scratch))
