"""The configuration under which PEFT reads a merged adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .modules import Layout
from .reading import Adapter
from .saved import saved_module


def merged_config(
    adapters: Sequence[Adapter],
    ranks: Mapping[str, int],
    layouts: Mapping[str, Layout],
    saved: Mapping[str, Tensor],
    separate: bool,
) -> Any:
    """
    The configuration under which PEFT reads the merged factors: alpha equals the rank everywhere, so every scale is one.

    Args:
        adapters (`Sequence[Adapter]`): in canonical order; what concerns training follows the first.
        ranks (`Mapping[str, int]`): rank of every adapted module.
        layouts (`Mapping[str, Layout]`): of the modules.
        saved (`Mapping[str, Tensor]`): tensors saved beside the factors.
        separate (`bool`): whether there are heads that are not among them.

    Returns:
        `LoraConfig`: without a task type, which would make PEFT look for a head, where adapters differ in it or heads are
        separate.
    """
    config = adapters[0].config
    rank = max(ranks.values())
    pattern = {f"^{re.escape(module)}": value for module, value in sorted(ranks.items()) if value != rank}
    bases = [adapter.config.base_model_name_or_path for adapter in adapters]
    one_task = not separate and all(adapter.config.task_type == config.task_type for adapter in adapters)
    merged = replace(
        config,
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        fan_in_fan_out=any(layout.transposed and not layout.embedding for layout in layouts.values()),
        modules_to_save=saved_targets(adapters, saved),
        task_type=config.task_type if one_task else None,
        base_model_name_or_path=next((base for base in bases if base), None),
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
        ensure_weight_tying=False,
        inference_mode=True,
        peft_version=None,
        **_targets(adapters, layouts),
    )
    return _ordered(merged)


def config_with_head(config: Any, adapter: Adapter, saved: Mapping[str, Tensor]) -> Any:
    """The configuration of the merged adapter with one adapter's own head among the saved tensors."""
    return _ordered(
        replace(config, modules_to_save=saved_targets([adapter], saved), task_type=adapter.config.task_type)
    )


def _ordered(config: Any) -> Any:
    # PEFT keeps names as sets, whose order in the file would change with the hash seed.
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, (set, list, tuple)):
            setattr(config, name, sorted(value))
    return config


def saved_targets(adapters: Sequence[Adapter], saved: Mapping[str, Tensor]) -> list[str] | None:
    """Those entries of `modules_to_save` whose tensors are there: PEFT asks the file for every module that it finds."""
    targets = sorted({target for adapter in adapters for target in adapter.config.modules_to_save or ()})
    modules = sorted({saved_module(key, targets) for key in saved})
    return [target for target in targets if any(module.endswith(target) for module in modules)] or None


def _targets(adapters: Sequence[Adapter], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """How the adapted modules are found: as in the adapters where they agree, else each by its whole name."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    first = {name: getattr(adapters[0].config, name) for name in fields}
    agree = all(getattr(adapter.config, name) == first[name] for adapter in adapters for name in fields)
    if agree and all(set(adapter.modules) == set(layouts) for adapter in adapters):
        return first
    # A list would also match longer names that end alike.
    names = "|".join(re.escape(module) for module in sorted(layouts))
    return {**dict.fromkeys(fields), "target_modules": f"({names})"}
