"""What a merged checkpoint says about itself: where it came from, how it was made, and a short card."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from .job import Job
from .staging import RECORD_NAME, Journal


def write_record(job: Job, folder: Path, journal: Journal, reloaded: str) -> dict[str, Any]:
    """
    Writes `merge_config.json`: recipe, inputs with digests and revisions, what happened to each kind of tensor, versions.

    A digest is XXH3-128 over the names and bytes of the tensors that were read, so it does not depend on how a
    checkpoint is cut into files.
    """
    recipe = job.recipe
    labels = [model.name for model in recipe.models]
    if recipe.base_model is not None:
        labels.append("(base)" if "base" in labels else "base")
    digests: list[dict[str, str]] = [{} for _ in job.readers]
    for (phase, _), entry in journal.entries.items():
        for place, part in enumerate(entry.get("inputs", ()) if phase == "write" else ()):
            digests[place].update(part)
    inputs = {
        label: {
            "model": recipe.base_model if place == len(recipe.models) else recipe.models[place].model,
            "revision": _revision(reader.path),
            "tensors": len(reader),
            "xxh3_128": _combined(digest),
        }
        for place, (label, reader, digest) in enumerate(zip(labels, job.readers, digests, strict=True))
    }
    groups = job.plan.groups
    record = {
        "recipe": asdict(recipe),
        "recipe_sha256": recipe.digest,
        "inputs": inputs,
        "tensors": {
            "written": len(job.layout.tensors),
            "merged": sum(map(len, groups.values())),
            "buffers": job.plan.pooled,
            "copied": sorted(set(job.layout.tensors) - set(job.plan.leader_of) - set(job.plan.pooled)),
            "left_out": job.plan.left_out,
        },
        "scale": job.merger.factor,
        "reloaded_as": reloaded,
        "notes": job.notes,
        "versions": _versions(),
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    (folder / RECORD_NAME).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_card(job), encoding="utf-8")
    return record


def _combined(digests: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(f"{key} {digests[key]}" for key in sorted(digests)).encode())


def _revision(path: Path) -> str | None:
    # The Hub's cache keeps every revision in a folder named after its commit.
    return path.name if path.parent.name == "snapshots" else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("hf-atm", "torch", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _card(job: Job) -> str:
    recipe = job.recipe
    hub = [model for model in (recipe.base_model, *(model.model for model in recipe.models)) if _on_hub(model)]
    head = ["---", "library_name: transformers", "tags:", "- hf-atm", "- model-merging"]
    if hub:
        head += ["base_model:", *(f"- {model}" for model in dict.fromkeys(hub)), "base_model_relation: merge"]
    rows = [f"| {model.name} | {model.weight:g} |" for model in recipe.models]
    base = f" on top of `{Path(recipe.base_model).name}`" if recipe.base_model else ""
    settings = ", ".join(f"`{key}={value}`" for key, value in sorted(recipe.parameters.items())) or "defaults"
    return "\n".join(
        [
            *head,
            "---",
            "",
            "# Merged model",
            "",
            f"{len(recipe.models)} models merged by `{recipe.merge_method}`{base} ({settings}).",
            "",
            "| model | weight |",
            "|---|---|",
            *rows,
            "",
            f"Recipe, digests of all inputs and versions: `{RECORD_NAME}`.",
            "",
        ]
    )


def _on_hub(model: str | None) -> bool:
    return (
        model is not None
        and model.count("/") == 1
        and not model.startswith((".", "/", "~"))
        and not Path(model).exists()
    )
