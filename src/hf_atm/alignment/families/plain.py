"""MLPs, VGGs and ResNets written in plain torch: specifications read from names, shapes and their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..spec import Axis, Flat, Group, PermutationSpec


_SHORTCUTS = ("shortcut", "downsample", "skip", "proj", "projection", "identity", "residual_conv")


class _Walk:
    """Layers in their order: every weight opens a group of outputs, and what follows carries it."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        state = model.state_dict() if isinstance(model, nn.Module) else model
        self.modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.modules.setdefault(owner, {})[leaf] = tensor
        self.groups: dict[str, Group] = {}
        self.axes: dict[str, tuple[Axis, ...]] = {}
        if isinstance(model, nn.Module):
            _refuse_group_norm(model)

    def is_weight(self, owner: str) -> bool:
        """Whether a module is a linear layer or a convolution."""
        return "weight" in self.modules[owner] and self.modules[owner]["weight"].ndim >= 2

    def layer(self, owner: str, incoming: str | None, outgoing: str | None) -> str | None:
        """Takes in a linear layer or convolution; returns its group of outputs."""
        weight = self.modules[owner]["weight"]
        if outgoing is not None:
            self._open(outgoing, weight.shape[0], owner)
        columns: Axis = incoming
        if incoming is not None:
            size = self._size(incoming)
            if weight.ndim == 2 and weight.shape[1] % size == 0 and weight.shape[1] != size:
                columns = f"{incoming}*{weight.shape[1] // size}"
            elif weight.shape[1] != size:
                raise ValueError(
                    f"Layer '{owner}' takes {weight.shape[1]} inputs, but the layer before gives {size}; layers must be "
                    "defined in the order they run and convolutions not grouped, else write a PermutationSpec."
                )
        for leaf, tensor in self.modules[owner].items():
            rest: tuple[Axis, ...] = (columns, *(None,) * (weight.ndim - 2)) if tensor.ndim >= 2 else ()
            self.axes[f"{owner}.{leaf}" if owner else leaf] = (outgoing, *rest)
        return outgoing

    def carry(self, owner: str, group: str | None) -> None:
        """Takes in a normalisation or another module with one value per channel."""
        for leaf, tensor in self.modules[owner].items():
            name = f"{owner}.{leaf}" if owner else leaf
            if tensor.numel() == 1 or tensor.ndim == 0:
                self.axes[name] = (None,) * tensor.ndim
                continue
            if tensor.ndim != 1 or (group is not None and len(tensor) != self._size(group)):
                raise ValueError(
                    f"Tensor '{name}' of shape {tuple(tensor.shape)} does not follow the "
                    f"{self._size(group) if group else 'input'} channels before it; write a PermutationSpec."
                )
            self.axes[name] = (group,)

    def spec(self) -> PermutationSpec:
        """What has been taken in."""
        return PermutationSpec(self.groups, self.axes)

    def _open(self, group: str, size: int, owner: str) -> None:
        if self.groups.setdefault(group, Flat(size)) != Flat(size):
            raise ValueError(
                f"Layer '{owner}' gives {size} channels to a stream of {self._size(group)}; a shortcut that pads or "
                "selects channels must be written as an explicit 1x1 convolution."
            )

    def _size(self, group: str) -> int:
        known: Any = self.groups[group]
        return known.size

    def chain(self, owners: Iterable[str], incoming: str | None, letters: str = "P") -> str | None:
        """Takes in modules that run one after the other; the last one with a weight keeps the order of its outputs."""
        owners = list(owners)
        last = [owner for owner in owners if self.is_weight(owner)][-1:]
        current = incoming
        for owner in owners:
            if self.is_weight(owner):
                outgoing = None if [owner] == last else f"{letters}.{len(self.groups)}"
                current = self.layer(owner, current, outgoing)
            else:
                self.carry(owner, current)
        return current


def mlp_spec(model: nn.Module | Mapping[str, Tensor]) -> PermutationSpec:
    """
    Symmetries of layers that run one after the other: linear layers, convolutions, norms, a flattening between.

    Args:
        model (`nn.Module` or `Mapping[str, Tensor]`):
            A network whose layers are defined in the order in which they run; inputs and outputs keep their order.

    Returns:
        [`PermutationSpec`]: one group per hidden layer, `P.0`, `P.1` and so on.

    Raises:
        `ValueError`: where sizes do not fit such a chain.

    Example:

    ```python
    >>> from torch import nn
    >>> from hf_atm.alignment import mlp_spec

    >>> mlp_spec(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).groups
    {'P.0': Flat(size=8)}
    ```
    """
    walk = _Walk(model)
    walk.chain(walk.modules, None)
    return walk.spec()


def vgg_spec(model: nn.Module | Mapping[str, Tensor]) -> PermutationSpec:
    """
    Symmetries of a VGG: one group per convolution and per hidden linear layer; the first linear layer behind the
    flattening takes every channel's positions together.

    Args:
        model (`nn.Module` or `Mapping[str, Tensor]`): as for [`mlp_spec`], which does the same.

    Returns:
        [`PermutationSpec`]

    Raises:
        `ValueError`: where sizes do not fit.
    """
    return mlp_spec(model)


def resnet_spec(model: nn.Module | Mapping[str, Tensor]) -> PermutationSpec:
    """
    Symmetries of a ResNet: one stream of channels per stage, one group inside each block.

    Blocks are recognised by names such as `layer1.0.conv1`: a number, then the layer. Inside a block the layers
    run in the order of their definition; a part named `shortcut`, `downsample` or `skip` is the shortcut, and a
    convolution in it opens a new stream.

    Args:
        model (`nn.Module` or `Mapping[str, Tensor]`):
            Convolutions with BatchNorm, LayerNorm over channels or GroupNorm with one group; norms before or behind
            the convolutions.

    Returns:
        [`PermutationSpec`]: streams `S.0`, `S.1` and so on, inner groups by the names of their layers.

    Raises:
        `ValueError`: where sizes do not fit, as with shortcuts that pad channels.
    """
    walk = _Walk(model)
    blocks: dict[str, list[str]] = {}
    for owner in walk.modules:
        blocks.setdefault(_block_of(owner), []).append(owner)
    stages = list(blocks)
    if len(stages) < 2:
        raise ValueError(
            "No residual blocks were found under names such as 'layer1.0.conv1'; write a PermutationSpec."
        )
    stream: str | None = None
    streams = 0
    for owner in walk.modules:
        block = _block_of(owner)
        if not block:
            # The stem opens the first stream, the classifier keeps the order of its outputs.
            if walk.is_weight(owner):
                outgoing = "S.0" if stream is None else None
                stream = walk.layer(owner, stream, outgoing)
            else:
                walk.carry(owner, stream)
            continue
        if block not in blocks:
            continue
        owners = blocks.pop(block)
        shortcut = [part for part in owners if _is_shortcut(part, block)]
        branch = [part for part in owners if part not in shortcut]
        before, widens = stream, any(walk.is_weight(part) for part in shortcut)
        streams += widens
        stream = f"S.{streams}" if widens else before
        _take_branch(walk, branch, before, stream)
        current = before
        for part in shortcut:
            if walk.is_weight(part):
                current = walk.layer(part, before, stream)
            else:
                walk.carry(part, current)
    return walk.spec()


def _take_branch(walk: _Walk, owners: list[str], before: str | None, after: str | None) -> None:
    weights = [owner for owner in owners if walk.is_weight(owner)]
    current = before
    for owner in owners:
        if walk.is_weight(owner):
            current = walk.layer(owner, current, after if owner == weights[-1] else f"B.{owner}")
        else:
            walk.carry(owner, current)


def _block_of(owner: str) -> str:
    parts = owner.split(".")
    cut = max((index for index, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[: cut + 1])


def _is_shortcut(owner: str, block: str) -> bool:
    return any(part in _SHORTCUTS for part in owner.removeprefix(f"{block}.").split("."))


def _refuse_group_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and 1 < module.num_groups < module.num_channels:
            raise ValueError(
                f"GroupNorm '{name}' has {module.num_groups} groups, whose channels may not mix; use one group, or write "
                "a PermutationSpec with Heads(num_groups, dim=channels_per_group)."
            )
