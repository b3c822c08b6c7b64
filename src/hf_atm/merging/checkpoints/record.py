"""What a merged checkpoint says about itself: where it came from, how it was made, and a short card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from ..card import MergedModel, MergeFacts, merge_card
from .alignment import alignment_facts
from .job import Job
from .staging import RECORD_NAME, STAGING_SUFFIX, Journal


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
        **({"alignment": facts} if (facts := alignment_facts(job)) else {}),
        "notes": job.notes,
        "versions": _versions(),
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    (folder / RECORD_NAME).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(merge_card(_facts(job, folder, record)), encoding="utf-8")
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


def _facts(job: Job, folder: Path, record: Mapping[str, Any]) -> MergeFacts:
    recipe, config = job.recipe, folder / "config.json"
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    return MergeFacts(
        name=folder.name.removesuffix(STAGING_SUFFIX),
        method=recipe.merge_method,
        inputs=[
            MergedModel(model.name, model.model, model.weight, record["inputs"][model.name]["xxh3_128"])
            for model in recipe.models
        ],
        base=recipe.base_model,
        parameters=recipe.parameters,
        versions=record["versions"],
        architecture=(architectures or [""])[0],
        digest="XXH3-128 of its tensors",
        record=RECORD_NAME,
        notes=job.notes,
        alignment=record.get("alignment", {}),
    )
