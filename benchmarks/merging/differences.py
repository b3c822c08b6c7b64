"""How far two merged models are apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def compare_models(ours: Path, theirs: Path, base: Path) -> dict[str, Any]:
    """Differences of two merged checkpoints, in float64.

    Returns:
        `dict`: `max_abs`, the largest difference of two entries; `relative`, the norm of the difference over the norm
        of their task vector, the largest of any tensor, and `worst`, that tensor's name; `norm_ratio`, the norm of our task vector over theirs, over all
        tensors; `equal`, share of equal entries; `missing`, names that only one of the two has.
    """
    with (
        safe_open(ours / "model.safetensors", "pt") as a,
        safe_open(theirs / "model.safetensors", "pt") as b,
        safe_open(base / "model.safetensors", "pt") as origin,
    ):
        shared = sorted(set(a.keys()) & set(b.keys()))
        missing = sorted(set(a.keys()) ^ set(b.keys()))
        pairs = (
            (name, *(file.get_tensor(name).double() - origin.get_tensor(name).double() for file in (a, b)))
            for name in shared
        )
        return differences(pairs) | {"missing": missing}


def compare_adapters(ours: Path, theirs: Path) -> dict[str, Any]:
    """Differences of the updates of two merged adapters; see [`compare_models`]."""
    a, b = dense_updates(ours), dense_updates(theirs)
    return differences((name, a[name], b[name]) for name in sorted(set(a) & set(b))) | {
        "missing": sorted(set(a) ^ set(b))
    }


def dense_updates(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """`alpha / r * B @ A` by module of the one adapter in a folder or in its subfolder."""
    (config_file,) = folder.rglob("adapter_config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    updates = {}
    with safe_open(config_file.with_name("adapter_model.safetensors"), "pt") as file:
        for name in file.keys():
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                down, up = (file.get_tensor(f"{module}.lora_{side}.weight").to(dtype) for side in "AB")
                path = module.removeprefix("base_model.model.")
                rank = config.get("rank_pattern", {}).get(path, config["r"])
                alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
                updates[module] = alpha / rank * (up @ down)
    return updates


def differences(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, Any]:
    """Figures of [`compare_models`] over pairs of tensors."""
    largest, relative, worst = 0.0, 0.0, None
    squares = [0.0, 0.0]
    equal = total = 0
    for name, ours, theirs in pairs:
        gap = ours - theirs
        largest = max(largest, float(gap.abs().max()))
        norm = float(theirs.norm())
        share = float(gap.norm()) / norm if norm else float(bool(gap.any()))
        if share > relative:
            relative, worst = share, name
        for index, tensor in enumerate((ours, theirs)):
            squares[index] += float(tensor.square().sum())
        equal += int((gap == 0).sum())
        total += gap.numel()
    ratio = (squares[0] / squares[1]) ** 0.5 if squares[1] else float("nan")
    return {
        "max_abs": largest,
        "relative": relative,
        "worst": worst,
        "norm_ratio": ratio,
        "equal": equal / max(1, total),
    }
