"""A run's model card: metadata for the Hub, text, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..card_parts import citations
from ..figures import draw_cosines, draw_interference, draw_rounds, draw_scores
from ..figures.scores import LEAST
from ..hub import card_mark
from . import sections
from .facts import CardFacts, read_facts


_TEMPLATE = Path(__file__).with_name("template.md")
FIGURES = "figures"


def write_card(
    folder: Path,
    name: str | None = None,
    repository: str | None = None,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    Draws a run's pictures and writes its card, `README.md`. Needs no network.

    Args:
        folder (`Path`):
            `output_dir` of a run whose model was saved.
        name (`str`, *optional*):
            What to call the model; the folder's name by default.
        repository (`str`, *optional*):
            Hub id that the code in the card loads from; the name by default.
        levels (`Mapping[str, Mapping[str, float]]`, *optional*):
            Scores of other methods on the same validation data, by name and task: columns of the table, and lines in
            the picture of the rounds.
        license, language, tags (*optional*):
            For the metadata; tags beside the card's own.

    Returns:
        `ModelCard`: as it was written.

    Raises:
        `FileNotFoundError`, `ValueError`, `OSError`: for a folder that is no finished run, or cannot be written to.
    """
    facts = read_facts(folder, name, levels)
    pictures = draw_pictures(facts, folder / FIGURES)
    card = render(facts, repository or facts.name, pictures, license, language, tags)
    beside = folder / "README.md.tmp"
    beside.write_text(str(card), encoding="utf-8")
    beside.replace(folder / "README.md")
    return card


def render(
    facts: CardFacts,
    repository: str,
    pictures: Mapping[str, str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card as an object.

    Args:
        facts ([`CardFacts`]): what to say.
        repository (`str`): where the code loads from.
        pictures (`Mapping[str, str]`, *optional*): caption by path.
        license, language, tags (*optional*): for the metadata.
    """
    return ModelCard.from_template(
        metadata(facts, license, language, tags),
        template_path=str(_TEMPLATE),
        mark=card_mark(repository),
        name=facts.name,
        summary=sections.summary(facts),
        usage=sections.usage(facts, repository),
        results=sections.results(facts),
        figures=[{"path": path, "caption": caption} for path, caption in (pictures or {}).items()],
        method=sections.method(facts),
        settings=sections.settings(facts),
        cost=sections.cost(facts),
        limits=sections.limits(facts),
        private=sections.private(facts),
        files=sections.files(facts),
        citation=citations(["atm", facts.rounds[-1]["method"]], facts.run["settings"]),
    )


def metadata(
    facts: CardFacts,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCardData:
    """What the Hub indexes: library, base model, data sets, metrics, tags and one result per task."""
    run, record = facts.run, facts.scored
    names = record["metric_names"] if record else {}
    settings: dict[str, Any] = {
        "license": license,
        "language": language,
        "library_name": "peft" if facts.is_adapter else "transformers",
        # The Trainer's tag says who wrote a card.
        "tags": sorted({"atm", "model-merging", "multi-task", *tags} - {"generated_from_trainer"}),
        "datasets": sorted(set(run["datasets"].values())) or None,
        "metrics": sorted(set(names.values())) or None,
        "base_model": None if run["model"]["is_local"] else run["model"]["base_model"],
        "base_model_relation": "adapter" if facts.is_adapter else "finetune",
    }
    results = _eval_results(facts)
    if results:
        settings |= {"model_name": facts.name, "eval_results": results}
    if settings["base_model"] is None:
        del settings["base_model_relation"]
    return ModelCardData(**{key: value for key, value in settings.items() if value is not None})


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    record, test = facts.scored, facts.test_scores()
    if record is None:
        return []
    return [
        EvalResult(
            task_type=_task_type(facts, task),
            task_name=task,
            dataset_type=facts.run["datasets"].get(task, task),
            dataset_name=task,
            dataset_split="test" if task in test else "validation",
            metric_type=name,
            metric_value=round(test.get(task, record["scores"][task]), 4),
        )
        for task, name in record["metric_names"].items()
    ]


def _task_type(facts: CardFacts, task: str) -> str:
    architecture = facts.exports.get(task) or " ".join(facts.config.get("architectures") or [])
    if "Image" in architecture or "image_pool" == facts.config.get("pooling"):
        return "image-classification"
    if "CausalLM" in architecture or "LMHead" in architecture:
        return "text-generation"
    return "text-classification"


def draw_pictures(facts: CardFacts, folder: Path) -> dict[str, str]:
    """
    The pictures that a run's report has numbers for, as PNG and SVG, and the landscape if it was drawn before.

    Args:
        facts ([`CardFacts`]):
            What to draw.
        folder (`Path`):
            Takes the files.

    Returns:
        `dict[str, str]`: captions by path of the PNG, relative to the folder's parent.
    """
    captions = {}
    last = facts.rounds[-1]
    averages = {
        name: sum(scores.values()) / len(scores)
        for name, scores in facts.levels.items()
        if set(scores) >= set(facts.tasks)
    }
    if draw_rounds(facts.rounds, folder / "rounds", averages):
        captions["rounds"] = "Score of every task after each merge"
    record = facts.scored
    if record and record["expert_scores"]:
        rows = {"experts": record["expert_scores"], "merged": record["scores"], **facts.levels}
        if draw_scores(rows, folder / "scores"):
            missing = [task for task, score in record["expert_scores"].items() if score < LEAST]
            captions["scores"] = "Scores as a share of the last experts'" + (
                f" (without {', '.join(missing)}, whose expert is below {LEAST})" if missing else ""
            )
    if len(last["tasks"]) > 1:
        draw_cosines(last["cosines"], folder / "cosines")
        captions["cosines"] = "Cosines between the last round's task vectors"
    layers = last.get("diagnostics", {}).get("task_vectors", {}).get("layers", {})
    if layers and draw_interference(layers, folder / "interference"):
        captions["interference"] = "Interference between tasks, by layer"
    if (folder / "landscape.png").is_file():
        captions["landscape"] = "Loss over the plane of the start, the merged model and an expert"
    return {f"{folder.name}/{stem}.png": caption for stem, caption in captions.items()}
