"""The card of a stage of continual ATM: what the model knows by then, and what it has kept of earlier tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from ..card_parts import auto_class, citations, code_block, table
from ..hub import card_mark
from ..run_facts import base_facts, hub_dataset
from .transfer import Transfer


if TYPE_CHECKING:
    from .settings import ContinualSettings
    from .stages import Stage
    from .suite import ContinualSuite


def write_stage_card(
    folder: Path,
    suite: ContinualSuite,
    settings: ContinualSettings,
    stages: list[Stage],
    figures: dict[str, Transfer],
) -> None:
    """Writes `README.md` of a finished stage.

    Args:
        folder (`Path`): the stage's, with its model.
        suite ([`ContinualSuite`]): model, data and settings of all stages.
        settings ([`ContinualSettings`]): replay, consolidation, storage.
        stages (`list[Stage]`): all stages so far, this one last.
        figures (`dict[str, Transfer]`): average and transfer so far, by split.
    """
    name = f"{Path(suite.args.output_dir).resolve().name}-{folder.name}"
    tasks = [task for stage in stages for task in stage.new]
    facts, args = base_facts(suite.model), suite.args
    base = f", tuned from `{facts['base_model']}`," if facts["base_model"] else ""
    atm = settings.method == "atm"
    method = (
        "continual ATM: in each stage new tasks and what was kept of earlier ones are tuned and merged in turns "
        "([ATM](https://huggingface.co/papers/2411.03055))"
        if atm
        else "OPCM: each task was tuned alone from the start, and its weights merged into those so far "
        "(https://huggingface.co/papers/2501.09522), without earlier data"
    )
    steps = f"{args.local_steps} steps" if args.local_steps is not None else f"{args.local_epochs:g} epochs"
    kept = f", replay {settings.replay:g}" if atm else ""
    kept += f", elastic weight consolidation {settings.ewc:g}" if settings.ewc else ""
    parts = [
        f"---\n{_metadata(suite, tasks, facts).to_yaml()}\n---",
        card_mark(name),
        f"# {name}",
        f"One model{base} that handles {len(tasks)} tasks, which arrived in {len(stages)} "
        f"{'stage' if len(stages) == 1 else 'stages'}: {', '.join(tasks)}. Made by {method}.",
        "## How to use",
        _usage(suite, name, tasks),
        "## Results",
        "Each task's first metric on validation data, after every stage"
        + (", and on test data" * bool(stages[-1].test)),
        _scores(stages, tasks),
        *(_figures(part, found) for part, found in figures.items()),
        "## How it was made",
        f"{args.num_rounds} rounds of {steps} per task and stage{kept}, learning rate {args.learning_rate:g}, "
        f"seed {args.seed}." + _replayed(stages[-1]),
        "Scores are of one seed; on anything but these tasks the model was not tested.",
        "## Citation",
        code_block(citations(["atm"] if atm else ["opcm"], {"moment_exponent": args.moment_exponent}), "bibtex"),
    ]
    beside = folder / "README.md.tmp"
    beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    beside.replace(folder / "README.md")


def _metadata(suite: ContinualSuite, tasks: list[str], facts: dict[str, Any]) -> ModelCardData:
    known = {task: hub_dataset(suite.train[task]) for task in tasks}
    settings: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["atm", "continual-learning", "hf-atm", "model-merging", "multi-task"],
    }
    if datasets := sorted({found for found in known.values() if found}):
        settings["datasets"] = datasets
    if facts["base_model"] and not facts["is_local"]:
        settings |= {"base_model": facts["base_model"], "base_model_relation": "finetune"}
    return ModelCardData(**settings)


def _usage(suite: ContinualSuite, name: str, tasks: list[str]) -> str:
    if suite.heads:
        return code_block(
            f'from hf_atm import MultiTaskModel\n\nmodel = MultiTaskModel.from_pretrained("{name}")\n'
            f'# model(task="{tasks[-1]}", ...); its tasks: {", ".join(tasks)}'
        )
    auto = auto_class(type(suite.model).__name__)
    return code_block(f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")')


def _scores(stages: list[Stage], tasks: list[str]) -> str:
    rows = [(f"stage {index + 1} (+ {', '.join(stage.new)})", stage.validation) for index, stage in enumerate(stages)]
    if stages[-1].test:
        rows.append(("last stage, test", stages[-1].test))
    cells = [[name, *(f"{scores[task]:.3f}" if task in scores else "" for task in tasks)] for name, scores in rows]
    return table(["", *tasks], cells)


def _figures(part: str, figures: Transfer) -> str:
    known = [f"average {figures.average:.3f}"]
    for name in ("backward", "forgetting", "forward"):
        value = getattr(figures, name)
        known += [] if value is None else [f"{name} {value:+.3f}"]
    return f"{part.capitalize()}: {', '.join(known)}."


def _replayed(stage: Stage) -> str:
    if not stage.replayed:
        return ""
    return (
        " Replayed in the last stage: " + ", ".join(f"{size} of {task}" for task, size in stage.replayed.items()) + "."
    )
