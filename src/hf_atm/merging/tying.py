"""Tied tensors: found by storage, merged once, still tied afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

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
