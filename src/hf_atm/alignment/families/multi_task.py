"""Multi-task models of this package: the backbone's symmetries, every task's head mapped along."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ..registry import spec_for_config
from ..spec import PermutationSpec


def multi_task_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Heads and the tasks' own copies of backbone tensors follow the backbone's order and take no part in matching."""
    spec = spec_for_config(config.backbone_config, names)
    axes = dict(spec.axes)
    if config.pooling is not None:
        # A chosen pooling reads the pooler or the stream, whatever the family's own class would read.
        stream = next((axis for axis in axes.get("classifier.1.weight", (None, "R"))[1:]), "R")
        axes["classifier.weight"] = (None, "Pool" if config.pooling == "pooler" and "Pool" in spec.groups else stream)
        axes["classifier.bias"] = (None,)
    axes["text_features"] = (None, None)
    optional = [*spec.optional, "classifier.weight", "classifier.bias", "text_features"]
    return replace(spec, axes=axes, heads=(*spec.heads, "heads.*", "task_specific.*"), optional=optional)
