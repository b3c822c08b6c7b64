"""The card of a one-shot merge: metadata for the Hub, code that loads it, inputs, recipe, papers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from ..card_parts import auto_class, citations, code_block, table
from ..hub import card_mark, on_hub, public_name


@dataclass(frozen=True)
class MergedModel:
    """One input of a merge.

    Args:
        name (`str`): what the recipe calls it.
        source (`str`): folder or Hub id.
        weight (`float`): its weight.
        digest (`str`): of its tensors; empty if there is none.
    """

    name: str
    source: str
    weight: float
    digest: str = ""


@dataclass(frozen=True)
class MergeFacts:
    """What the card of a merge says.

    Args:
        name (`str`): what to call the model.
        method (`str`): the merge method.
        inputs (`Sequence[MergedModel]`): the models.
        base (`str`, *optional*): folder or Hub id of the model they were tuned from.
        parameters (`Mapping`): of the method.
        versions (`Mapping[str, str]`): of the packages.
        architecture (`str`): class of the merged model, as in `config.json`; `""` for an adapter.
        is_adapter (`bool`): whether it is an adapter for `base`.
        usage (`str`): code that loads it, where a stock class does not.
        digest (`str`): what `inputs` have as digests.
        record (`str`): name of the file with everything else.
        notes (`Sequence[str]`): what the user should know.
        alignment (`Mapping`): how the models were brought into one order of units; empty if they were not.
    """

    name: str
    method: str
    inputs: Sequence[MergedModel]
    base: str | None
    parameters: Mapping[str, Any]
    versions: Mapping[str, str]
    architecture: str = ""
    is_adapter: bool = False
    usage: str = ""
    digest: str = "SHA-256"
    record: str = "merge_config.json"
    notes: Sequence[str] = field(default_factory=tuple)
    alignment: Mapping[str, Any] = field(default_factory=dict)


def merge_card(facts: MergeFacts) -> str:
    """The text of `README.md`. Folders of this machine appear by their last name alone.

    Args:
        facts ([`MergeFacts`]): what to say.
    """
    kind = "LoRA adapters" if facts.is_adapter else "models"
    base = f", tuned from `{public_name(facts.base)}`" if facts.base else ""
    parts = [
        f"---\n{_metadata(facts).to_yaml()}\n---",
        card_mark(facts.name),
        f"# {facts.name}",
        f"{len(facts.inputs)} {kind}{base}, merged by `{facts.method}`. No data were used beyond what the method itself "
        "asks for, and the merge evaluated nothing: test it on your tasks before you rely on it.",
        "## How to use",
        code_block(facts.usage or _usage(facts)),
        "## How it was made",
        _inputs(facts),
        *([_alignment(facts)] if facts.alignment else []),
        code_block(_recipe(facts), "yaml"),
        *(["\n".join(f"- {note}" for note in facts.notes)] if facts.notes else []),
        f"`{facts.record}` holds everything, digests of all inputs included. Made with "
        + ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        + ".",
    ]
    papers = citations([facts.method, *([facts.alignment["method"]] if facts.alignment else [])])
    if papers:
        parts += ["## Citation", code_block(papers, "bibtex")]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: MergeFacts) -> ModelCardData:
    sources = [model.source for model in facts.inputs]
    # What is merged of adapters is an adapter for their base; a merge of models descends from all of them.
    known = [source for source in ([facts.base] if facts.is_adapter else [facts.base, *sources]) if on_hub(source)]
    settings: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "tags": ["hf-atm", "merge", "model-merging", *(["lora"] if facts.is_adapter else [])],
    }
    if known:
        settings["base_model"] = known[0] if len(known) == 1 else list(dict.fromkeys(known))
        settings["base_model_relation"] = "adapter" if facts.is_adapter else "merge"
    return ModelCardData(**settings)


def _usage(facts: MergeFacts) -> str:
    if facts.is_adapter:
        return f'from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained("{facts.name}")'
    auto = auto_class(facts.architecture)
    return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{facts.name}")'


def _inputs(facts: MergeFacts) -> str:
    digests = any(model.digest for model in facts.inputs)
    rows = [
        [f"`{public_name(model.source)}`", f"{model.weight:g}", *([f"`{model.digest}`"] if digests else [])]
        for model in facts.inputs
    ]
    return table(["model", "weight", *([facts.digest] if digests else [])], rows)


def _alignment(facts: MergeFacts) -> str:
    found = facts.alignment
    moved = ", ".join(f"`{public_name(name)}` {count}" for name, count in found["moved"].items())
    return (
        f"Before the merge, `{found['method']}` brought the units of all models into the order of "
        f"`{public_name(found['frame'])}`, which changes none of them as a function: the inner products of their weights, "
        f"summed over pairs of models, rose from {found['objective_before']:.4g} to {found['objective_after']:.4g}. Of "
        f"{found['units']} units moved: {moved}."
    )


def _recipe(facts: MergeFacts) -> str:
    recipe: dict[str, Any] = {"merge_method": facts.method}
    if facts.base and not facts.is_adapter:
        recipe["base_model"] = public_name(facts.base)
    recipe["models"] = [
        {"model": public_name(model.source), "parameters": {"weight": model.weight}} for model in facts.inputs
    ]
    if facts.alignment:
        recipe["align"] = facts.alignment["recipe"]
    if facts.parameters:
        recipe["parameters"] = json.loads(json.dumps(facts.parameters, default=str))
    return yaml.safe_dump(recipe, sort_keys=False, width=100).rstrip()
