"""One stage of continual ATM, by either method, and a task tuned alone for reference."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..checkpoint import checkpoints, recover
from ..config import ATMConfig
from ..merging import collect_fisher
from ..trainer import ATMTrainer
from .archive import TaskVectorArchive
from .consolidation import Consolidation, ElasticWeightConsolidation
from .replay import replay_sample
from .settings import ContinualSettings
from .suite import ContinualSuite, only_tasks, with_changes


CONSOLIDATION_NAME = "consolidation.safetensors"


def stage_data(
    suite: ContinualSuite, settings: ContinualSettings, earlier: list[str], new: list[str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Training data of a stage by task, and how many examples of each earlier task are among them."""
    train, replayed = {task: suite.train[task] for task in new}, {}
    for task in earlier if settings.method == "atm" else []:
        sample = replay_sample(task, suite.train[task], settings.replay, suite.args.seed)
        if sample is not None:
            train[task], replayed[task] = sample, len(sample)
    return train, replayed


def atm_stage(
    suite: ContinualSuite,
    settings: ContinualSettings,
    model: Any,
    earlier: list[str],
    new: list[str],
    folder: Path,
    before: Path | None,
) -> list[dict[str, Any]]:
    """A run of ATM on the new tasks and samples of the earlier ones; returns its report.

    Args:
        suite ([`ContinualSuite`]): model and data.
        settings ([`ContinualSettings`]): replay and consolidation.
        model: the model of the stage before.
        earlier, new (`list[str]`): tasks known already, and tasks that arrive.
        folder (`Path`): takes the model.
        before (`Path`, *optional*): folder of the stage before.
    """
    suite.add_heads(model, new)
    train, _ = stage_data(suite, settings, earlier, new)
    held = None
    with only_tasks(model, list(train)):
        trainer = suite.trainer(model, list(train), train, _run_args(suite, folder))
        if settings.ewc and before is not None:
            held = Consolidation.load(before / CONSOLIDATION_NAME)
            trainer.add_callback(ElasticWeightConsolidation(trainer.model, held, settings.ewc))
        trainer.train(resume_from_checkpoint=bool(checkpoints(trainer.args.output_dir)) or None)
    trainer.save_model(str(folder))
    if settings.ewc:
        for task in new:
            held = _consolidate(trainer, held, task, suite.train[task], settings.fisher_examples, suite.args.seed)
        assert held is not None
        held.save(folder / CONSOLIDATION_NAME)
    return trainer.report


def opcm_stage(
    suite: ContinualSuite,
    settings: ContinualSettings,
    model: Any,
    start: Mapping[str, Any],
    earlier: list[str],
    new: list[str],
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """New tasks tuned alone from the start, their task vectors stored, and all stored ones merged in sequence.

    Args:
        suite, settings, model, earlier, new, folder: as for [`atm_stage`].
        start (`Mapping[str, Tensor]`): shared weights that every task starts from.

    Returns:
        `tuple[list[dict], dict[str, int]]`: the run's report, and bytes on disk of each new task vector.
    """
    model.load_state_dict(start, strict=False)
    suite.add_heads(model, new)
    args = suite.args
    alone: dict[str, Any] = {
        "num_rounds": 1,
        "local_steps": None if args.local_steps is None else args.local_steps * args.num_rounds,
        "local_epochs": args.local_epochs * args.num_rounds,
        "keep_task_vectors": True,
        "head_steps": 0,
    }
    with only_tasks(model, new):
        trainer = suite.trainer(model, new, suite.train, with_changes(_run_args(suite, folder), **alone))
        # Task vectors are not in a checkpoint, so an interrupted stage begins anew.
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
        trainer.train()
    archive = TaskVectorArchive(folder.parent / "task_vectors", settings.compression)
    sizes = {task: archive.store(task, trainer.atm.rounds.merged_vectors[task]) for task in new}
    move = archive.merge([*earlier, *new], **settings.merge_kwargs)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in move.items():
            parameters[name].copy_(start[name] + tensor)
    trainer.save_model(str(folder))
    return trainer.report, sizes


def reference_scores(
    suite: ContinualSuite, pristine: Any, task: str, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Validation and test score of a model tuned on one task alone from the start, for as long as a stage takes."""
    model = copy.deepcopy(pristine)
    suite.add_heads(model, [task])
    with only_tasks(model, [task]):
        # Alone, a task's weight among others means nothing.
        args = with_changes(_run_args(suite, folder), task_weights="uniform")
        trainer = suite.trainer(model, [task], suite.train, args)
        trainer.train(resume_from_checkpoint=bool(checkpoints(trainer.args.output_dir)) or None)
        validation, test = (
            trainer.quiet_scores({task: sets[task]} if task in sets else {}) for sets in (suite.validation, suite.test)
        )
    return validation, test


def _run_args(suite: ContinualSuite, folder: Path) -> ATMConfig:
    run_dir = folder / "run"
    recover(str(run_dir))
    if not checkpoints(str(run_dir)):
        shutil.rmtree(run_dir, ignore_errors=True)
    return with_changes(suite.args, output_dir=str(run_dir))


def _consolidate(
    trainer: ATMTrainer, held: Consolidation | None, task: str, dataset: Any, examples: int, seed: int
) -> Consolidation:
    model, collator = trainer.model, trainer.data_collator
    rows = dataset.shuffle(seed=seed).select(range(min(examples, len(dataset))))
    loader: DataLoader[Any] = DataLoader(rows, batch_size=8, collate_fn=lambda batch: collator.collate(task, batch))
    inputs = {"task": task} if collator.add_task else None
    fisher = collect_fisher(model, loader, None, labels="given", inputs=inputs, disable_tqdm=True)
    shared = trainer.atm.groups.shared
    anchor = {name: parameter.detach().to("cpu", copy=True) for name, parameter in shared.items()}
    return (held or Consolidation({}, {})).extended({name: fisher[name] for name in shared}, anchor)
