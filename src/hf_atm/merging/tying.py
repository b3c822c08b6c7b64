"""Tied tensors: found by storage, merged once, still tied afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor


def alias_of(tensor: Tensor) -> tuple | None:
    """Equal for two tensors that are the same view of the same memory; `None` for tensors without memory."""
    if not isinstance(tensor, Tensor) or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    storage = tensor.untyped_storage().data_ptr()
    return (str(tensor.device), storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def tied_groups(states: Sequence[Mapping[str, Tensor]], keys: Iterable[str]) -> dict[str, list[str]]:
    """
    Groups the keys whose tensors are tied in *every* state dict.

    Tensors that only some models tie have been trained apart in the others and are merged apart.

    Returns:
        `dict[str, list[str]]`: alphabetically first key of each group to all keys of the group, itself included.
    """
    groups: dict[tuple, list[str]] = {}
    for key in sorted(keys):
        identity = tuple(alias_of(state[key]) or key for state in states)
        groups.setdefault(identity, []).append(key)
    return {members[0]: members for members in groups.values()}


def complete_ties(states: Sequence[MutableMapping[str, Tensor]]) -> None:
    """
    Adds, in place, keys that a state dict lacks only because its tied partner stands for both, as in safetensors files.

    A partner is a key that another state dict ties to the missing one.
    """
    partners: dict[str, list[str]] = {}
    for state in states:
        aliases: dict[tuple, list[str]] = {}
        for key in sorted(state):
            alias = alias_of(state[key])
            if alias is not None:
                aliases.setdefault(alias, []).append(key)
        for members in aliases.values():
            for key in members:
                partners.setdefault(key, []).extend(other for other in members if other != key)
    for state in states:
        for key in sorted(partners):
            stand_in = next((other for other in sorted(partners[key]) if other in state), None)
            if key not in state and stand_in is not None:
                state[key] = state[stand_in]


def tied_by_content(states: Sequence[Mapping[str, Tensor]], tied_head: bool) -> dict[str, str]:
    """
    Copies of tied tensors in files, where memory cannot show which are tied.

    A name counts as a copy if, in every state that has it, its entries equal those of one and the same other tensor that
    all states have, and either some state does without it or the configuration says that the head is tied.

    Args:
        states (`Sequence[Mapping[str, Tensor]]`): the models, the reference last.
        tied_head (`bool`): whether the result's configuration ties the head to the embeddings.

    Returns:
        `dict[str, str]`: name of each copy to the name that stands for it.
    """
    everywhere = [key for key in states[-1] if all(key in state for state in states)]
    names = sorted({key for state in states for key in state})
    partial = [key for key in names if not all(key in state for state in states)]
    heads = [key for key in everywhere if tied_head and "head" in key.rpartition(".")[0].rpartition(".")[2]]
    copies = {}
    for key in [*partial, *heads]:
        holders = [state for state in states if key in state]
        shape = holders[0][key].shape
        if len(shape) != 2:
            continue
        for other in everywhere:
            if other != key and states[-1][other].shape == shape:
                if all(_equal(state[key], state[other]) for state in holders):
                    copies[key] = other
                    break
    return copies


def _equal(left: Tensor, right: Tensor) -> bool:
    # The first row tells most pairs apart without reading the rest.
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left[:1], right[:1])
        and torch.equal(left, right)
    )
