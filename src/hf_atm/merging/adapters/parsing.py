"""From an adapter's configuration and tensors to exact updates; whatever has none is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..tensors import check_finite, listed
from .factors import INEXACT_OPTIONS
from .modules import Layout, LoraModule, split_factors


# Initialisations that also change the base weights: s B A is not what such an adapter adds to the original ones.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_config(path: Path, label: str) -> LoraConfig:
    """
    Reads `adapter_config.json` without dropping what this version of PEFT does not know.

    Raises:
        ValueError: for a file that is no configuration, another adapter type, or an unknown option that is set.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} of {label!r} cannot be read ({error}); copy it again.") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise ValueError(_no_lora(label, kind))
    _refuse_options(content, label)
    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    unknown = sorted(key for key, value in content.items() if key not in known and key != "runtime_config" and value)
    if unknown:
        raise ValueError(
            f"The adapter {label!r} sets {listed(unknown)}, which the installed PEFT does not know and which may change "
            "what its factors mean; upgrade PEFT."
        )
    try:
        return LoraConfig(**{key: value for key, value in content.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name} of {label!r} is no valid LoraConfig ({error}); save the adapter again."
        ) from error


def check_config(config: Any, label: str) -> None:
    """
    Refuses adapters whose update is not `s B A`.

    Raises:
        ValueError: naming the adapter, the option and the way out.
    """
    # Subclasses (AdaLoRA, ...) mean their factors differently.
    if type(config) is not LoraConfig:
        raise ValueError(_no_lora(label, getattr(config, "peft_type", None) or type(config).__name__))
    _refuse_options(vars(config), label)
    start = str(config.init_lora_weights).lower()
    if start.startswith(_MOVES_BASE):
        raise ValueError(
            f"The adapter {label!r} was initialised by {start!r}, which moved the base weights too; save it with "
            "path_initial_model_for_weight_conversion, or set init_lora_weights=true in its configuration if its base "
            "model was saved with the moved weights."
        )


def _refuse_options(options: Mapping[str, Any], label: str) -> None:
    used = [option for option in INEXACT_OPTIONS if options.get(option)]
    if used:
        raise ValueError(
            f"The adapter {label!r} uses {', '.join(used)}, which has no exact low-rank update; fold it into its base "
            "model and merge the whole models with merge_state_dicts."
        )


def _no_lora(label: str, kind: Any) -> str:
    kind = getattr(kind, "value", kind)
    return (
        f"The adapter {label!r} is of type {kind}, not LORA, and its parameters do not add up to a low-rank update; fold "
        "it into its base model and merge the whole models with merge_state_dicts."
    )


def parse_state(
    config: LoraConfig, state: Mapping[str, Tensor], label: str
) -> tuple[dict[str, LoraModule], dict[str, Tensor]]:
    """
    Finds the adapted modules with their scales, and the other saved tensors.

    Args:
        config (`LoraConfig`): checked.
        state (`Mapping[str, Tensor]`): the adapter's tensors under PEFT's names.
        label (`str`): what messages call the adapter.

    Returns:
        `tuple[dict[str, LoraModule], dict[str, Tensor]]`: both by name in the base model, sorted.

    Raises:
        ValueError: for tensors that are not finite, quantised, or fit neither each other nor the configuration.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} of {label!r} is a {type(tensor).__name__} and no tensor.")
        if tensor.dtype in DTYPES:
            check_finite(tensor, name, label)
    pairs, rest, strange = split_factors(state)
    if strange:
        raise ValueError(
            f"The adapter {label!r} holds {listed(strange)}, which are no pair of LoRA factors; pass the tensors as "
            "peft.get_peft_model_state_dict gives them, and none of a LoRA variant."
        )
    if not pairs:
        raise ValueError(f"The adapter {label!r} holds no LoRA factors; check that it was saved by PEFT.")
    modules = {name: _module(config, name, *pairs[name], label) for name in sorted(pairs)}
    return modules, {name: rest[name] for name in sorted(rest)}


def _module(config: LoraConfig, name: str, a: Tensor, b: Tensor, embedding: bool, label: str) -> LoraModule:
    where = f"Module {name!r} of the adapter {label!r}"
    if a.dtype not in DTYPES or b.dtype not in DTYPES:
        raise ValueError(f"{where} has quantised factors ({a.dtype}); save it in a floating type of 16 bits or more.")
    if "base_layer" in name.split("."):
        raise ValueError(f"{where} lies inside an nn.MultiheadAttention, which is not supported; exclude it.")
    if a.ndim < 2 or b.ndim < 2 or 0 in (*a.shape, *b.shape) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{where} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)} that do not multiply; grouped "
            "convolutions and sharded factors are not supported."
        )
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    if a.shape[0] != rank:
        raise ValueError(
            f"{where} has rank {a.shape[0]}, but its configuration says {rank}; they are of two adapters."
        )
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    inner = tuple(a.shape[1:])
    transposed = embedding or (config.fan_in_fan_out and len(inner) == 1)
    return LoraModule(a, b, scale, Layout(b.shape[0], inner, embedding, transposed))
