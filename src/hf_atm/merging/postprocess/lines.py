"""LiNeS: later layers keep more of a merged task vector than earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from .registry import is_finite, register_post_processor


# Names of the lists that hold a model's layers; the number follows, as in `model.layers.3.mlp`.
_STACKS = ("layers", "layer", "h", "blocks", "block", "resblocks", "stages", "albert_layer_groups")

# What comes before the first layer; everything else outside the layers comes after the last.
_INPUTS = (
    *("*embed*", "*wte.*", "*wpe.*", "shared.*", "*.shared.*", "*patch_*", "*stem.*", "conv1.*", "bn1.*"),
    *("*cls_token*", "*class_token*", "*mask_token*", "*pre_layernorm*", "*pre_layrnorm*", "*ln_pre*"),
)


def prepare_lines(
    keys: Sequence[str],
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    method: str,
    **_kwargs: Any,
) -> dict[str, int]:
    """Number of layers of each stack, such as encoder and decoder."""
    depths: dict[str, int] = {}
    for key in sorted(keys):
        place = layer_of(key)
        if place is not None:
            stack, layer = place
            depths[stack] = max(depths.get(stack, 0), layer + 1)
    return depths


_NUMBER = ("a finite number", is_finite)


@register_post_processor("lines", prepare=prepare_lines, ranges={"alpha": _NUMBER, "beta": _NUMBER})
def lines(
    merged: Mapping[str, Tensor],
    task_vectors: Sequence[Mapping[str, Tensor]] = (),
    weights: Sequence[float] = (),
    names: Sequence[str] = (),
    *,
    alpha: float,
    beta: float,
    context: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """
    LiNeS: scales a merged task vector by depth (https://huggingface.co/papers/2410.17146).

    Layer l of L, counted from 1, is multiplied by `alpha + beta * (l - 1) / (L - 1)`. The layer is the number after
    `layers`, `layer`, `h`, `blocks`, `block`, `resblocks` or `stages` in a tensor's name, the first of them if there
    are several; each stack, such as encoder and decoder, is counted by itself, and a single layer counts as first.
    Embeddings and what else comes before the first layer are multiplied by `alpha`, final norms, poolers and heads by
    `alpha + beta`. Deviation: the authors' code gives `alpha` to everything outside the layers.

    Args:
        merged (`Mapping[str, Tensor]`):
            Merged task vector, before any scale.
        task_vectors, weights, names (`Sequence`, *optional*):
            Not used.
        alpha (`float`):
            Factor of the first layer.
        beta (`float`):
            What is added to it over the depth of the model.

    Returns:
        `dict[str, Tensor]`: the same tensors, in the same types.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import lines

    >>> lines({f"layers.{index}.w": torch.ones(1) for index in range(3)}, alpha=0.2, beta=0.8)
    {'layers.0.w': tensor([0.2000]), 'layers.1.w': tensor([0.6000]), 'layers.2.w': tensor([1.])}
    ```
    """
    depths = prepare_lines(list(merged), task_vectors, weights, names, method="") if context is None else context
    return {key: tensor * (alpha + beta * _relative_depth(key, depths)) for key, tensor in merged.items()}


def layer_of(key: str) -> tuple[str, int] | None:
    """The stack a tensor belongs to and the number of its layer there, from 0; `None` outside all stacks."""
    parts = key.split(".")
    for index, (name, number) in enumerate(zip(parts, parts[1:], strict=False)):
        if name in _STACKS and number.isdecimal():
            return ".".join(parts[: index + 1]), int(number)
    return None


def _relative_depth(key: str, depths: Mapping[str, int]) -> float:
    place = layer_of(key)
    if place is None:
        return 0.0 if any(fnmatchcase(key, pattern) for pattern in _INPUTS) else 1.0
    stack, layer = place
    return layer / (depths[stack] - 1) if depths[stack] > 1 else 0.0
