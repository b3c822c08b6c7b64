"""Modules that adapters save whole: task heads stay per task or are decided by the user, the others are averaged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..state_dict import merge_state_dicts
from ..tensors import listed
from .reading import Adapter


# Saved tensors of one module by adapter.
Owners = Mapping[str, Mapping[str, Tensor]]

POLICIES = ("error", "merge", "separate")

# Parts of module names that mark a task's own output layers.
TASK_HEADS = (
    "bbox_predictor",
    "classifier",
    "decode_head",
    "fc",
    "head",
    "heads",
    "logits_proj",
    "qa_outputs",
    "score",
    "summary",
)


@dataclass(frozen=True)
class SavedModules:
    """What becomes of the tensors that adapters save beside their factors.

    Args:
        shared (`dict[str, Tensor]`): those of the merged adapter, by name in the base model.
        separate (`dict[str, dict[str, Tensor]]`): by task, those of that task alone.
        fate (`dict[str, str]`): `"same"`, `"only <task>"`, `"mean"`, `"from <task>"` or `"separate"`, by module.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    separate: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fate: dict[str, str] = field(default_factory=dict)


def merge_saved(
    adapters: Sequence[Adapter], weights: Sequence[float], heads: str, strict: bool, dtype: torch.dtype | None
) -> SavedModules:
    """
    Decides about every saved module, see [`merge_adapters`], and carries the decision out.

    Args:
        adapters (`Sequence[Adapter]`): in canonical order.
        weights (`Sequence[float]`): their weights, for means.
        heads (`str`): `"error"`, `"merge"`, `"separate"` or the name of one adapter.
        strict (`bool`): whether a module other than a head that only some adapters save is an error.
        dtype (`torch.dtype`, *optional*): type of merged tensors; as stored by default.

    Raises:
        ValueError: naming modules, adapters and the ways out.
    """
    names = [adapter.name for adapter in adapters]
    if heads not in POLICIES and heads not in names:
        raise ValueError(f"heads={heads!r} is unknown; choose one of {listed([*POLICIES, *names])}.")
    result = SavedModules()
    for module, owners in _by_module(adapters).items():
        lacking = [name for name in names if name not in owners]
        result.fate[module] = fate = _fate(module, owners, lacking, heads, strict)
        if fate == "separate":
            for name, tensors in owners.items():
                result.separate.setdefault(name, {}).update(tensors)
        elif fate == "mean":
            shares = [weight for name, weight in zip(names, weights, strict=True) if name in owners]
            result.shared.update(_mean(module, owners, shares, dtype))
        elif fate != "undecided":
            result.shared.update(owners[fate.partition(" ")[2] or next(iter(owners))])
    undecided = [module for module, fate in result.fate.items() if fate == "undecided"]
    if undecided:
        raise ValueError(
            f"The adapters have different task heads, {listed(undecided)}; pass heads='separate' to keep each beside the "
            "merged adapter, heads='<name of an adapter>' to take that adapter's, or heads='merge' to average them."
        )
    return result


def _fate(module: str, owners: Owners, lacking: Sequence[str], heads: str, strict: bool) -> str:
    head = _is_head(module, owners)
    if head and lacking and len(owners) == 1:
        return f"only {next(iter(owners))}"
    if lacking and not head:
        text = f"The saved module {module!r} is missing in {listed(lacking)}"
        if strict:
            raise ValueError(f"{text}; pass strict=False to average those that have it.")
        warnings.warn(f"{text} and averaged over {listed(list(owners))}.", stacklevel=5)
    if _all_same(owners):
        return "same"
    if not head or heads == "merge":
        return "mean"
    if heads in ("error", "separate"):
        return "separate" if heads == "separate" else "undecided"
    if heads not in owners:
        raise ValueError(f"heads={heads!r}, but that adapter saves no {module!r}; {listed(list(owners))} do.")
    return f"from {heads}"


def _by_module(adapters: Sequence[Adapter]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Saved tensors by module, then by adapter."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for adapter in adapters:
        for key, tensor in adapter.saved.items():
            module = saved_module(key, adapter.config.modules_to_save or ())
            found.setdefault(module, {}).setdefault(adapter.name, {})[key] = tensor
    return {module: found[module] for module in sorted(found)}


def saved_module(key: str, targets: Sequence[str]) -> str:
    """The module a saved tensor belongs to: the one that `modules_to_save` names, or else the tensor's own."""
    parts = key.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        module = ".".join(parts[:length])
        if any(module.endswith(target) for target in targets):
            return module
    return ".".join(parts)


def _is_head(module: str, owners: Owners) -> bool:
    shapes = [sorted((key, tuple(tensor.shape)) for key, tensor in tensors.items()) for tensors in owners.values()]
    parts = module.split(".")
    return any(part in TASK_HEADS or part.endswith("classifier") for part in parts) or shapes != shapes[:1] * len(
        shapes
    )


def _all_same(owners: Owners) -> bool:
    first, *others = owners.values()
    return all(
        set(other) == set(first) and all(torch.equal(other[key], first[key]) for key in first) for other in others
    )


def _mean(module: str, owners: Owners, weights: Sequence[float], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    shapes = {name: [tuple(tensors[key].shape) for key in sorted(tensors)] for name, tensors in owners.items()}
    if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
        raise ValueError(f"{module!r} has different shapes, {shapes}, and no mean; pass heads='separate'.")
    if abs(sum(weights)) <= 1e-12 * sum(abs(weight) for weight in weights):
        raise ValueError(f"The weights {list(weights)} sum to zero, so that {module!r} has no mean; change them.")
    return merge_state_dicts(list(owners.values()), weights=weights, names=list(owners), dtype=dtype)
