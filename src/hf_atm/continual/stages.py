"""Stages of continual ATM: what is new, what is replayed, what is held, and how well everything is known after each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..checkpoint import checkpoints, recover, write_json
from ..config import ATMConfig
from ..merging import collect_fisher
from ..trainer import ATMTrainer
from .archive import TaskVectorArchive
from .consolidation import Consolidation, ElasticWeightConsolidation
from .replay import check_replay, replay_sample
from .settings import ContinualSettings, check_stages
from .transfer import Transfer, transfer


STAGE_NAME, REPORT_NAME, CONSOLIDATION_NAME = "stage.json", "continual.json", "consolidation.safetensors"


@dataclass
class Stage:
    """One finished stage.

    Args:
        new (`list[str]`): tasks that arrived.
        replayed (`dict[str, int]`): earlier tasks and the examples of theirs that were replayed.
        validation, test (`dict[str, float]`): first metric of every task known by then.
        rounds (`list[dict]`): the run's report.
        stored_bytes (`dict[str, int]`): size of stored task vectors on disk (OPCM).
    """

    new: list[str]
    replayed: dict[str, int]
    validation: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    stored_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class ContinualRun:
    """All stages, and what learning each task did to the others."""

    stages: list[Stage]
    transfer: dict[str, Transfer]
    references: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return dataclasses.asdict(self)


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
        prepare (`Callable[[ATMTrainer], None]`, *optional*): done to every trainer before it runs.
    """

    model: Any
    heads: Mapping[str, dict[str, Any]]
    train: Mapping[str, Any]
    validation: Mapping[str, Any]
    args: ATMConfig
    test: Mapping[str, Any] = field(default_factory=dict)
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[ATMTrainer], None] = lambda trainer: None

    def trainer(self, model: Any, tasks: Sequence[str], train: Mapping[str, Any], args: ATMConfig) -> ATMTrainer:
        """A trainer over some of the tasks."""
        kwargs = dict(self.trainer_kwargs)
        for name, value in kwargs.items():
            if name in ("compute_metrics", "data_collator") and isinstance(value, Mapping):
                kwargs[name] = {task: value[task] for task in tasks}
        trainer = ATMTrainer(
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


def run_stages(
    suite: ContinualSuite,
    stages: Sequence[Sequence[str]],
    settings: ContinualSettings | None = None,
    report: Callable[[int, Stage], None] = lambda index, stage: None,
) -> ContinualRun:
    """Tasks arrive stage by stage; each stage ends with a model in `output_dir/stage-<k>` that knows all so far.

    Finished stages are not repeated, and an interrupted one goes on from its last checkpoint.

    Args:
        suite ([`ContinualSuite`]): model and data.
        stages (`Sequence[Sequence[str]]`): for each stage, the tasks that are new in it.
        settings ([`ContinualSettings`], *optional*): replay, consolidation, storage.
        report (`Callable[[int, Stage], None]`, *optional*): is told of each finished stage.

    Returns:
        [`ContinualRun`]: also in `output_dir/continual.json`.

    Raises:
        ValueError: before anything runs, for a schedule, replay or model that does not fit.
    """
    settings = settings or ContinualSettings()
    order = check_stages(stages, list(suite.train))
    check_replay(suite.train, settings.replay)
    peft = suite.trainer_kwargs.get("peft_config") is not None
    if peft and (settings.method == "opcm" or suite.args.lora_merge_mode != "delta" or settings.ewc):
        raise ValueError(
            "Stages with an adapter need method 'atm' without ewc, and lora_merge_mode='delta', so that each stage ends "
            "with whole weights."
        )
    output = Path(suite.args.output_dir)
    start = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in suite.model.state_dict().items()
        if not name.startswith("heads.")
    }
    model, done = suite.model, []
    for index, new in enumerate(order):
        folder = output / f"stage-{index + 1}"
        identity = {"stages": order[: index + 1], "settings": dataclasses.asdict(settings), "seed": suite.args.seed}
        stage = _read(folder, identity)
        if stage is None:
            if index:
                model = type(suite.model).from_pretrained(output / f"stage-{index}")
            suite.add_heads(model, new)
            earlier = [task for tasks in order[:index] for task in tasks]
            run = _opcm_stage if settings.method == "opcm" else _atm_stage
            stage = run(suite, settings, model, start, earlier, new, folder)
            write_json(folder / STAGE_NAME, {**dataclasses.asdict(stage), "identity": identity})
            shutil.rmtree(folder / "run", ignore_errors=True)
        done.append(stage)
        report(index, stage)
    references = _references(suite, order, start, output) if settings.references else {}
    figures = {
        part: transfer([getattr(stage, part) for stage in done], order, references.get(part))
        for part in ("validation", "test")
        if getattr(done[-1], part)
    }
    result = ContinualRun(done, figures, references)
    write_json(output / REPORT_NAME, result.to_dict())
    return result


def _read(folder: Path, identity: dict[str, Any]) -> Stage | None:
    path = folder / STAGE_NAME
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.pop("identity") != json.loads(json.dumps(identity)):
        raise ValueError(f"{path} belongs to another schedule or other settings; choose another output_dir.")
    return Stage(**stored)


def _atm_stage(
    suite: ContinualSuite,
    settings: ContinualSettings,
    model: Any,
    start: Mapping[str, Any],
    earlier: list[str],
    new: list[str],
    folder: Path,
) -> Stage:
    """A run of ATM on the new tasks and samples of the earlier ones."""
    train, replayed = {task: suite.train[task] for task in new}, {}
    for task in earlier:
        sample = replay_sample(task, suite.train[task], settings.replay, suite.args.seed)
        if sample is not None:
            train[task], replayed[task] = sample, len(sample)
    number = int(folder.name.rpartition("-")[2])
    consolidation = folder.with_name(f"stage-{number - 1}") / CONSOLIDATION_NAME
    with only_tasks(model, list(train)):
        trainer = suite.trainer(model, list(train), train, _args(suite, folder))
        held = Consolidation.load(consolidation) if settings.ewc and consolidation.is_file() else None
        if held is not None:
            trainer.add_callback(ElasticWeightConsolidation(trainer.model, held, settings.ewc))
        trainer.train(resume_from_checkpoint=bool(checkpoints(trainer.args.output_dir)) or None)
    trainer.save_model(str(folder))
    if settings.ewc:
        for task in new:
            held = _consolidate(trainer, held, task, suite.train[task], settings.fisher_examples, suite.args.seed)
        held.save(folder / CONSOLIDATION_NAME)  # type: ignore[union-attr]
    return Stage(new, replayed, *_score(suite, folder, [*earlier, *new]), rounds=trainer.report)


def _opcm_stage(
    suite: ContinualSuite,
    settings: ContinualSettings,
    model: Any,
    start: Mapping[str, Any],
    earlier: list[str],
    new: list[str],
    folder: Path,
) -> Stage:
    """New tasks tuned alone from the start, their task vectors stored, and all stored ones merged in sequence."""
    model.load_state_dict(start, strict=False)
    args = suite.args
    steps = None if args.local_steps is None else args.local_steps * args.num_rounds
    alone: dict[str, Any] = {
        "num_rounds": 1,
        "local_steps": steps,
        "local_epochs": args.local_epochs * args.num_rounds,
        "keep_task_vectors": True,
        "head_steps": 0,
    }
    with only_tasks(model, new):
        trainer = suite.trainer(model, new, suite.train, _with(_args(suite, folder), **alone))
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
    return Stage(new, {}, *_score(suite, folder, [*earlier, *new]), rounds=trainer.report, stored_bytes=sizes)


def _args(suite: ContinualSuite, folder: Path) -> ATMConfig:
    run_dir = folder / "run"
    recover(str(run_dir))
    if not checkpoints(str(run_dir)):
        shutil.rmtree(run_dir, ignore_errors=True)
    return _with(suite.args, output_dir=str(run_dir))


def _with(args: ATMConfig, **changes: Any) -> ATMConfig:
    return dataclasses.replace(args, **changes)


def _score(suite: ContinualSuite, folder: Path, tasks: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Validation and test scores of a saved model."""
    model = type(suite.model).from_pretrained(folder)
    args = _with(suite.args, output_dir=str(folder / "run"), local_steps=1, head_steps=0)
    scorer = ContinualSuite.trainer(
        dataclasses.replace(suite, trainer_kwargs={**suite.trainer_kwargs, "peft_config": None}),
        model,
        tasks,
        suite.validation,
        args,
    )
    validation = scorer.quiet_scores({task: suite.validation[task] for task in tasks})
    test = scorer.quiet_scores({task: suite.test[task] for task in tasks if task in suite.test})
    # In the order of arrival.
    return {task: validation[task] for task in tasks}, {task: test[task] for task in tasks if task in test}


def _consolidate(
    trainer: ATMTrainer, held: Consolidation | None, task: str, dataset: Any, examples: int, seed: int
) -> Consolidation:
    model, collator = trainer.model, trainer.data_collator
    rows = dataset.shuffle(seed=seed).select(range(min(examples, len(dataset))))
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_size=8,
        collate_fn=lambda batch: collator.collate(task, batch),
    )
    inputs = {"task": task} if collator.add_task else None
    fisher = collect_fisher(model, loader, None, labels="given", inputs=inputs, disable_tqdm=True)
    shared = trainer.atm.groups.shared
    anchor = {name: parameter.detach().to("cpu", copy=True) for name, parameter in shared.items()}
    return (held or Consolidation({}, {})).extended({name: fisher[name] for name in shared}, anchor)


def _references(
    suite: ContinualSuite, order: list[list[str]], start: Mapping[str, Any], output: Path
) -> dict[str, dict[str, float]]:
    """Scores of models tuned on one later task alone, for as many steps as its stage gave it."""
    later = [task for tasks in order[1:] for task in tasks]
    folder = output / "references"
    path = folder / STAGE_NAME
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    result: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    model = suite.model
    suite.add_heads(model, later)
    for task in later:
        model.load_state_dict(start, strict=False)
        with only_tasks(model, [task]):
            trainer = suite.trainer(model, [task], suite.train, _args(suite, folder / task))
            trainer.train(resume_from_checkpoint=bool(checkpoints(trainer.args.output_dir)) or None)
            for part in result:
                sets = getattr(suite, part)
                result[part] |= trainer.quiet_scores({task: sets[task]} if task in sets else {})
        shutil.rmtree(folder / task, ignore_errors=True)
    write_json(path, result)
    return result


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
