"""What a run was: model, tasks, settings, versions, hardware. Written into `atm_report.json`, read by the model card."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from peft import PeftModel

from .identity import settings_of
from .ledger import cost_of
from .parameters import base_model


_VERSIONS = ("hf-atm", "torch", "transformers", "peft", "accelerate", "datasets")
_HUB_SOURCE = re.compile(r"hf://datasets/([^@/]+/[^@/]+)@")


def run_facts(trainer: Any) -> dict[str, Any]:
    """Facts of a trainer's run, JSON-ready.

    Args:
        trainer: an [`ATMMixin`].

    Returns:
        `dict`: `model`, `examples`, `datasets` (Hub ids, for tasks whose data are known to come from there), `settings`
        that are not defaults, `seed`, `steps`, `cost`, `kept_step` (after which the weights were taken), `processes`, `hardware`, `versions`.
    """
    args, model, best = trainer.args, trainer.model, trainer.state.best_global_step
    plain = base_model(model)
    return {
        "model": {
            "class": type(plain).__name__,
            **base_facts(plain),
            "adapter": isinstance(model, PeftModel),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "shared_parameters": sum(parameter.numel() for parameter in trainer.atm.groups.shared.values()),
        },
        "examples": dict(trainer.atm.num_examples),
        "datasets": {
            task: found for task, data in trainer.atm.datasets.items() if (found := hub_dataset(data)) is not None
        },
        "settings": settings_of(args),
        "seed": args.seed,
        "steps": trainer.atm.plan.total_steps,
        "cost": cost_of(trainer),
        "kept_step": best if args.load_best_model_at_end and best is not None else trainer.state.global_step,
        "batch": trainer.atm.global_batch,
        "processes": args.world_size,
        "hardware": hardware(args.device),
        "versions": {name: metadata.version(name) for name in _VERSIONS} | {"python": platform.python_version()},
    }


def base_facts(model: Any) -> dict[str, Any]:
    """Where a model's weights came from: `base_model`, a Hub id or a folder's name, and whether it `is_local`."""
    config = getattr(model, "config", None)
    name = getattr(config, "base_model_name_or_path", None) or getattr(config, "_name_or_path", None)
    if not name:
        return {"base_model": None, "is_local": False}
    local = os.path.exists(name) or os.path.isabs(name)
    # A path is nobody's business, and means nothing elsewhere.
    return {"base_model": os.path.basename(str(name).rstrip("/\\")) if local else str(name), "is_local": local}


def hub_dataset(data: Any) -> str | None:
    """The Hub id that a data set was downloaded from, if it says so."""
    checksums = getattr(getattr(data, "info", None), "download_checksums", None)
    for source in checksums if isinstance(checksums, Mapping) else ():
        found = _HUB_SOURCE.match(str(source))
        if found:
            return found.group(1)
    return None


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})" if device.type == "cpu" else str(device)
