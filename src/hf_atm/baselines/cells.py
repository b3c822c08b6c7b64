"""One member of a comparison with one seed: run it, score it, remember it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from ..checkpoint import checkpoints, recover, write_json
from ..config import ATMConfig
from ..trainer import ATMTrainer
from .joint import JointTrainer
from .ledger import cost_of, shared_bytes
from .members import Member
from .one_shot import OneShotMerges
from .presets import get_baseline


CELL_NAME = "cell.json"


@dataclass
class Suite:
    """Model and data that all members of a comparison share.

    Args:
        build_model (`Callable[[int], Any]`): a fresh model, its heads decided by the seed.
        train, validation (`Mapping[str, Dataset]`): data by task.
        args ([`ATMConfig`]): settings that hold for every member unless it says otherwise.
        test (`Mapping[str, Dataset]`, *optional*): data by task; scored once, at each run's end.
        trainer_kwargs (`Mapping[str, Any]`, *optional*): what else [`ATMTrainer`] takes.
        prepare (`Callable[[ATMTrainer], None]`, *optional*): done to every trainer before it runs.
    """

    build_model: Callable[[int], Any]
    train: Mapping[str, Any]
    validation: Mapping[str, Any]
    args: ATMConfig
    test: Mapping[str, Any] = field(default_factory=dict)
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
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
        `dict`: `rows` by name, each with `validation` and `test` scores by task and a `cost`; a `curve` of validation
        scores by optimizer steps per task; the `settings`.

    Raises:
        ValueError: when the folder holds a result of other settings.
    """
    done = folder / CELL_NAME
    identity = {"baseline": member.baseline, "settings": dict(settings), "merges": list(member.merges), "seed": seed}
    if done.is_file():
        stored = json.loads(done.read_text(encoding="utf-8"))
        if stored["identity"] != identity:
            raise ValueError(
                f"{done} was made with other settings than {member.name!r} has now; delete its folder, or choose "
                "another output."
            )
        return stored
    run_dir = folder / "run"
    recover(str(run_dir))
    if member.kind == "one_shot" or not checkpoints(str(run_dir)):
        # Scores of the experts are with the callback alone, so an interrupted one-shot run begins anew.
        shutil.rmtree(run_dir, ignore_errors=True)
    trainer = build_trainer(suite, member, settings, seed, run_dir)
    merges = None
    if member.kind == "one_shot":
        merges = OneShotMerges(trainer, member.merges, suite.test)
        trainer.add_callback(merges)
    started = perf_counter()
    trainer.train(resume_from_checkpoint=bool(checkpoints(str(run_dir))) or None)
    cost = cost_of(trainer, isinstance(trainer, JointTrainer), perf_counter() - started)
    result: dict[str, Any] = {"identity": identity, "rows": {}, "curve": curve_of(trainer)}
    if merges is not None:
        cost["communicated_bytes"] = 2 * len(suite.train) * shared_bytes(trainer)
        for name, row in merges.rows.items():
            label = name if name == "experts" else f"one-shot {name}"
            own = {**cost, "searched_examples": row.get("searched", 0)}
            result["rows"][label] = {**row, "cost": {**own, "communicated_bytes": 0} if name == "experts" else own}
    else:
        scores = {part: trainer.quiet_scores(sets) for part, sets in _sets(trainer, suite).items()}
        result["rows"][member.name] = {**scores, "cost": cost}
    write_json(done, result)
    shutil.rmtree(run_dir, ignore_errors=True)
    return result


def build_trainer(suite: Suite, member: Member, settings: Mapping[str, Any], seed: int, run_dir: Path) -> ATMTrainer:
    """The trainer of one cell."""
    args = dataclasses.replace(suite.args, **{**settings, "seed": seed, "output_dir": str(run_dir)})
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
