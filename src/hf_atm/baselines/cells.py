"""One member of a comparison with one seed: run it, score it, remember it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import checkpoints, recover, write_json
from ..config import ATMConfig
from ..identity import claim, settings_of, sizes_of
from ..ledger import cost_of
from ..merge_report import DivergenceError
from ..trainer import ATMTrainer
from .joint import JointTrainer
from .members import Member
from .one_shot import OneShotMerges
from .presets import get_baseline


CELL_NAME, IDENTITY_NAME = "cell.json", "identity.json"


@dataclass
class Suite:
    """Model and data that all members of a comparison share.

    Args:
        build_model (`Callable[[int], Any]`): a fresh model, its heads decided by the seed.
        train, validation (`Mapping[str, Dataset]`): data by task.
        args ([`ATMConfig`]): settings that hold for every member unless it says otherwise.
        test (`Mapping[str, Dataset]`, *optional*): data by task; scored once, at each run's end.
        trainer_kwargs (`Mapping[str, Any]`, *optional*): what else [`ATMTrainer`] takes.
        identity (`Mapping[str, Any]`, *optional*): what else tells this model and data from others; kept results of
            another one are refused.
        prepare (`Callable[[ATMTrainer], None]`, *optional*): done to every trainer before it runs.
    """

    build_model: Callable[[int], Any]
    train: Mapping[str, Any]
    validation: Mapping[str, Any]
    args: ATMConfig
    test: Mapping[str, Any] = field(default_factory=dict)
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[ATMTrainer], None] = lambda trainer: None


def run_cell(suite: Suite, member: Member, settings: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Runs a member with one seed, or goes on where it was interrupted, or returns what it gave before.

    Args:
        suite ([`Suite`]): model and data.
        member ([`Member`]): the method.
        settings (`Mapping[str, Any]`): all its settings, from [`check_budgets`].
        seed (`int`): decides heads, adapter, order of data and dropout.
        folder (`Path`): belongs to this cell alone. It ends up holding `cell.json`.

    Returns:
        `dict`: `rows` by name, each with `validation` and `test` scores by task and a `cost`, or `failed`, why there are
        none; a `curve` of validation scores by optimizer steps per task; the `settings` that are not defaults.

    Raises:
        ValueError: when the folder holds a result of other settings.
    """
    done = folder / CELL_NAME
    run_dir = folder / "run"
    claim(folder / IDENTITY_NAME, identity_of(suite, member, settings, seed))
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    recover(str(run_dir))
    if member.kind == "one_shot" or not checkpoints(str(run_dir)):
        # Scores of the experts are with the callback alone, so an interrupted one-shot run begins anew.
        shutil.rmtree(run_dir, ignore_errors=True)
    trainer = build_trainer(suite, member, settings, seed, run_dir)
    merges = None
    if member.kind == "one_shot":
        merges = OneShotMerges(trainer, member.merges, suite.test)
        trainer.add_callback(merges)
    try:
        trainer.train(resume_from_checkpoint=bool(checkpoints(str(run_dir))) or None)
        if merges is not None:
            rows = _one_shot_rows(member, merges, trainer)
        else:
            scores = {part: trainer.quiet_scores(sets) for part, sets in _sets(trainer, suite).items()}
            rows = {member.name: {**scores, "cost": cost_of(trainer)}}
    except DivergenceError as error:
        rows = {member.name: {"failed": str(error), "cost": cost_of(trainer)}}
    for row in rows.values():
        _mark_failure(row)
    result: dict[str, Any] = {"settings": settings_of(trainer.args), "rows": rows, "curve": curve_of(trainer)}
    write_json(done, result)
    shutil.rmtree(run_dir, ignore_errors=True)
    return result


def identity_of(suite: Suite, member: Member, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Everything that decides a cell's result."""
    return {
        "baseline": member.baseline,
        "merges": list(member.merges),
        "settings": settings_of(_args(suite, settings, seed, suite.args.output_dir)),
        "suite": suite.identity,
        "examples": sizes_of(train=suite.train, validation=suite.validation, test=suite.test),
    }


def _args(suite: Suite, settings: Mapping[str, Any], seed: int, output_dir: str) -> ATMConfig:
    return dataclasses.replace(suite.args, **{**settings, "seed": seed, "output_dir": output_dir})


def _one_shot_rows(member: Member, merges: OneShotMerges, trainer: ATMTrainer) -> dict[str, dict[str, Any]]:
    """The experts, and each method untuned and tuned, with what each of them cost."""
    # Under its usual name it needs no more; several of them must be told apart.
    prefix = "" if member.name == "one_shot" else f"{member.name}, "
    cost, rows = cost_of(trainer), {}
    for name, row in merges.rows.items():
        label = "experts" if name == "experts" else f"one-shot {name}"
        seconds = {
            **cost["seconds_by_part"],
            "merging": row["merging"],
            "searching": row["searching"],
            "evaluating": 0.0,
        }
        rows[f"{prefix}{label}"] = {
            **{part: row[part] for part in ("validation", "test")},
            "scale": row.get("scale"),
            "cost": {
                **cost,
                "seconds": sum(seconds.values()),
                "seconds_by_part": seconds,
                "communicated_bytes": 0 if name == "experts" else cost["communicated_bytes"],
                "searched_examples": row["searched"],
            },
        }
    return rows


def _mark_failure(row: dict[str, Any]) -> None:
    """A score that is no number makes a row that counts as failed, rather than one that spoils every mean."""
    for part in ("validation", "test"):
        for task, score in row.get(part, {}).items():
            if not math.isfinite(score):
                row["failed"] = f"the {part} score of task {task!r} is {score}"


def build_trainer(suite: Suite, member: Member, settings: Mapping[str, Any], seed: int, run_dir: Path) -> ATMTrainer:
    """The trainer of one cell."""
    args = _args(suite, settings, seed, str(run_dir))
    model = suite.build_model(seed)
    kwargs = dict(suite.trainer_kwargs)
    kind = member.kind
    if kind == "heads":
        if not hasattr(model, "backbone"):
            raise ValueError(f"{member.name!r} trains heads over a frozen backbone, and this model has none.")
        model.backbone.requires_grad_(False)
        kwargs.pop("peft_config", None)
    callbacks = get_baseline(member.baseline).callbacks(seed)
    if kind in ("joint", "joint_proportional", "heads"):
        kwargs["proportional"] = kind == "joint_proportional"
        trainer_class: type[ATMTrainer] = JointTrainer
    else:
        trainer_class = ATMTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=dict(suite.train),
        eval_dataset=dict(suite.validation),
        callbacks=callbacks,
        **kwargs,
    )
    for callback in callbacks:
        callback.check(trainer.model)
    suite.prepare(trainer)
    return trainer


def curve_of(trainer: ATMTrainer) -> list[dict[str, Any]]:
    """Validation scores by optimizer steps per task, one entry per evaluated round."""
    plan = trainer.atm.plan
    per_task = plan.round_steps / len(plan.tasks)
    return [
        {"steps": (record["round"] + 1) * per_task, "scores": record["scores"]}
        for record in trainer.report
        if record.get("scores")
    ]


def _sets(trainer: ATMTrainer, suite: Suite) -> dict[str, Mapping[str, Any]]:
    return {"validation": trainer.eval_dataset, "test": suite.test}
