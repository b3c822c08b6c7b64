"""Stages of continual ATM: what is new, what is replayed, what is held, and how well everything is known after each."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import write_json
from ..identity import claim, settings_of, sizes_of
from .card import write_stage_card
from .checks import check_run
from .settings import ContinualSettings, check_stages
from .stage_runs import atm_stage, opcm_stage, reference_scores, stage_data
from .suite import ContinualSuite
from .transfer import Transfer, transfer


STAGE_NAME, IDENTITY_NAME, REPORT_NAME = "stage.json", "identity.json", "continual.json"


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


def run_stages(
    suite: ContinualSuite,
    stages: Sequence[Sequence[str]],
    settings: ContinualSettings | None = None,
    report: Callable[[int, Stage], None] = lambda index, stage: None,
) -> ContinualRun:
    """Tasks arrive stage by stage; each ends with a model and its card in `output_dir/stage-<k>` that knows all so far.

    Finished stages are not repeated. An interrupted one goes on from its last checkpoint where `save_strategy` makes
    any; one of OPCM begins anew.

    Args:
        suite ([`ContinualSuite`]): model and data.
        stages (`Sequence[Sequence[str]]`): for each stage, the tasks that are new in it.
        settings ([`ContinualSettings`], *optional*): replay, consolidation, storage.
        report (`Callable[[int, Stage], None]`, *optional*): is told of each finished stage.

    Returns:
        [`ContinualRun`]: also in `output_dir/continual.json`.

    Raises:
        ValueError: before anything runs, for a schedule, replay, model or setting that does not fit some stage, or
            finished stages of another run.
    """
    settings = settings or ContinualSettings()
    order = check_stages(stages, list(suite.train))
    check_run(suite, order, settings)
    output = Path(suite.args.output_dir)
    folders = [output / f"stage-{index + 1}" for index in range(len(order))]
    identities = [_identity(suite, settings, order[: index + 1]) for index in range(len(order))]
    for folder, identity in zip(folders, identities, strict=True):
        if (folder / IDENTITY_NAME).is_file():
            claim(folder / IDENTITY_NAME, identity)
    pristine = copy.deepcopy(suite.model) if settings.references else None
    start = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in suite.model.state_dict().items()
        if not name.startswith(("heads.", "task_specific."))
    }
    model = suite.model
    done: list[Stage] = []
    for index, (new, folder) in enumerate(zip(order, folders, strict=True)):
        earlier = [task for tasks in order[:index] for task in tasks]
        if not (folder / STAGE_NAME).is_file():
            claim(folder / IDENTITY_NAME, identities[index])
            if index:
                model = type(suite.model).from_pretrained(folders[index - 1])
            stored: dict[str, int] = {}
            if settings.method == "opcm":
                rounds, stored = opcm_stage(suite, settings, model, start, earlier, new, folder)
            else:
                before = folders[index - 1] if index else None
                rounds = atm_stage(suite, settings, model, earlier, new, folder, before)
            saved = type(suite.model).from_pretrained(folder)
            scores = suite.score(saved, [*earlier, *new], str(folder / "run"))
            _, replayed = stage_data(suite, settings, earlier, new)
            stage = Stage(new, replayed, *scores, rounds, stored)
            write_stage_card(folder, suite, settings, [*done, stage], _figures([*done, stage], order))
            write_json(folder / STAGE_NAME, dataclasses.asdict(stage))
            shutil.rmtree(folder / "run", ignore_errors=True)
        stage = Stage(**json.loads((folder / STAGE_NAME).read_text(encoding="utf-8")))
        done.append(stage)
        report(index, stage)
    write_json(output / REPORT_NAME, ContinualRun(done, _figures(done, order)).to_dict())
    references = _references(suite, order, pristine, output) if settings.references else {}
    result = ContinualRun(done, _figures(done, order, references), references)
    write_json(output / REPORT_NAME, result.to_dict())
    return result


def _figures(
    stages: Sequence[Stage],
    order: Sequence[Sequence[str]],
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Transfer]:
    """Average and transfer after these stages, by split."""
    return {
        part: transfer([getattr(stage, part) for stage in stages], order, (references or {}).get(part))
        for part in ("validation", "test")
        if getattr(stages[-1], part)
    }


def _identity(suite: ContinualSuite, settings: ContinualSettings, order: list[list[str]]) -> dict[str, Any]:
    """Everything that decides a stage's result."""
    values = dataclasses.asdict(settings)
    # Tuned apart from the stages, and kept apart.
    values.pop("references")
    return {
        "stages": order,
        "continual": values,
        "settings": settings_of(suite.args),
        "suite": suite.identity,
        "examples": sizes_of(train=suite.train, validation=suite.validation, test=suite.test),
    }


def _references(
    suite: ContinualSuite, order: list[list[str]], pristine: Any, output: Path
) -> dict[str, dict[str, float]]:
    """Scores of models tuned on one later task alone, by split."""
    folder, identity = output / "references", _identity(suite, ContinualSettings(), [])
    claim(folder / IDENTITY_NAME, identity)
    result: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for task in (task for tasks in order[1:] for task in tasks):
        path = folder / f"{task}.json"
        if not path.is_file():
            validation, test = reference_scores(suite, pristine, task, folder / task)
            write_json(path, {"validation": validation, "test": test})
            shutil.rmtree(folder / task, ignore_errors=True)
        stored = json.loads(path.read_text(encoding="utf-8"))
        for part in result:
            result[part] |= stored[part]
    return result
