"""ResNets of transformers: BatchNorm, one stream of channels per stage."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..spec import Flat, Group, PermutationSpec
from .bert import TASK_HEADS
from .parts import Axes, batch_norm, linear


def hf_resnet_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Of ResNets with basic or bottleneck blocks."""
    groups: dict[str, Group] = {"S.0": Flat(config.embedding_size)}
    axes = _unit("embedder.embedder", "S.0", None)
    stream, streams, width = "S.0", 0, config.embedding_size
    for stage, (size, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        for block in range(depth):
            at = f"encoder.stages.{stage}.layers.{block}"
            strided = block == 0 and (stage > 0 or config.downsample_in_first_stage)
            before = stream
            if strided or (block == 0 and size != width):
                streams += 1
                stream = f"S.{streams}"
                groups[stream] = Flat(size)
                axes |= _unit(f"{at}.shortcut", stream, before)
            narrow = size // 4 if config.layer_type == "bottleneck" else size
            inner = [f"B.{stage}.{block}.{index}" for index in range(2 if config.layer_type == "bottleneck" else 1)]
            groups |= dict.fromkeys(inner, Flat(narrow))
            path = [before, *inner, stream]
            for index, (columns, rows) in enumerate(zip(path, path[1:], strict=False)):
                axes |= _unit(f"{at}.layer.{index}", rows, columns)
        width = size
    classifier = linear("classifier.1", None, stream)
    return PermutationSpec(groups, axes | classifier, TASK_HEADS, list(classifier))


def _unit(name: str, rows: str, columns: str | None) -> Axes:
    weight: Axes = {f"{name}.convolution.weight": (rows, columns, None, None)}
    return weight | batch_norm(f"{name}.normalization", rows)
