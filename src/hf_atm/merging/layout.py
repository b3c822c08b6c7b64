"""Which weight matrices are stored input side first, as GPT-2's Conv1D does, found from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch


def transposed_keys(shapes: Mapping[str, torch.Size], patterns: Sequence[str] | None = None) -> frozenset[str]:
    """
    Names of the matrices with shape `(inputs, outputs)` instead of `(outputs, inputs)`.

    A bias has one entry per output, so it tells the sides of an oblong matrix apart; a square matrix, which no shape
    tells anything about, is taken to be stored as the others of its module are (`attn.c_proj` as `attn.c_attn`).

    Args:
        shapes (`Mapping[str, torch.Size]`):
            Shapes of all tensors of a model, biases included.
        patterns (`Sequence[str]`, *optional*):
            Name patterns of the matrices in question, in place of that rule.

    Returns:
        `frozenset[str]`: the names, to be asked for, not gone through.
    """
    matrices = [key for key in sorted(shapes) if len(shapes[key]) == 2]
    if patterns is not None:
        return frozenset(key for key in matrices if any(fnmatchcase(key, pattern) for pattern in patterns))
    verdicts: dict[str, bool] = {}
    by_module: dict[str, list[bool]] = {}
    for key in matrices:
        first, second = shapes[key]
        bias = shapes.get(key.removesuffix("weight") + "bias") if key.endswith("weight") else None
        if first != second and bias in ((first,), (second,)):
            verdicts[key] = bias == (second,)
            by_module.setdefault(_module_of(key), []).append(verdicts[key])
    for key in matrices:
        if shapes[key][0] == shapes[key][1]:
            verdicts[key] = all(by_module.get(_module_of(key), [False]))
    return frozenset(key for key, transposed in verdicts.items() if transposed)


def _module_of(key: str) -> str:
    """The module that holds the layer of a weight."""
    return ".".join(key.split(".")[:-2])
