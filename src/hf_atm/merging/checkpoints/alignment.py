"""Recipes over models from different starts: the key `align`, and checkpoints read in the order of another one's units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import flat
from ..registry import MergeMethod, get_merge_method, list_merge_methods
from ..tensors import LazyTensors, nearest
from .processes import Processes
from .staging import is_resumable, staging_folder


if TYPE_CHECKING:
    from ...alignment import Alignment, Permutation
    from .job import Job

# Beside the weights and not among them: loaders that take every safetensors file of a folder must not find the maps.
MAPS_NAME = "alignment/alignment.safetensors"

_KEYS = ("method", "starts", "max_iter", "tol", "polish", "heads", "seed")
_COUNTS = {"max_iter": 1, "polish": 0, "seed": 0}
# Float32 copies of each model that alignment holds at its peak, measured on encoders.
_COPIES = 20


def parse_align(value: Any) -> dict[str, Any]:
    """
    The recipe key `align` as keywords of [`~hf_atm.alignment.align`].

    Args:
        value (`str`, mapping or `None`): a method, or `{method: c2m3, starts: [...], heads: [...], ...}`.

    Returns:
        `dict[str, Any]`: empty where nothing is to be aligned.

    Raises:
        `ValueError`: for an unknown key or method, `"activations"`, or a value out of range.
    """
    if value is None or value == {}:
        return {}
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"Recipe key 'align' must be a method or a mapping such as {{method: c2m3}}, got {value!r}.")
    for key in value:
        if key not in _KEYS:
            raise ValueError(f"Recipe key 'align' has an unknown key '{key}'; {nearest(str(key), _KEYS)}")
    from ...alignment.matching import METHODS
    from ...alignment.starts import STARTS

    settings = {"method": "c2m3", **value}
    method = settings["method"]
    if method == "activations":
        raise ValueError(
            "Recipe key 'align' cannot be 'activations', which needs data; call hf_atm.alignment.align(models, "
            "method='activations', data=...) in Python, or write align: c2m3."
        )
    if method not in METHODS:
        known = ", ".join(name for name in METHODS if name != "activations")
        raise ValueError(f"Recipe key 'align' has method={method!r}; expected one of {known}.")
    for key, choices in (("starts", list(STARTS)), ("heads", None)):
        if key in settings:
            _check_list(key, settings[key], choices)
    for key, least in _COUNTS.items():
        number = settings.get(key, least)
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise ValueError(f"Recipe key 'align' has {key}={number!r}; expected a whole number of at least {least}.")
    tol = settings.get("tol", 0.0)
    if not isinstance(tol, Real) or isinstance(tol, bool) or not 0 <= float(tol) < math.inf:
        raise ValueError(f"Recipe key 'align' has tol={tol!r}; expected a number of at least 0.")
    return {key: list(entry) if key in ("starts", "heads") else entry for key, entry in settings.items()}


def _check_list(key: str, entries: Any, choices: Sequence[str] | None) -> None:
    listed = isinstance(entries, Sequence) and not isinstance(entries, str)
    if not listed or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"Recipe key 'align' has {key}={entries!r}; write a list, {key}: [{entries!r}].")
    unknown = [entry for entry in entries if choices is not None and entry not in choices]
    if choices is not None and (unknown or not entries):
        raise ValueError(f"Recipe key 'align' has {key}={list(entries)!r}; list at least one of {', '.join(choices)}.")


def check_alignable(rule: MergeMethod, has_base: bool) -> None:
    """
    Refuses merge methods that do not fit models from different starts.

    Raises:
        `ValueError`: for a method on task vectors without a base, or one with statistics, which lie in each model's
            own order.
    """
    if "statistics" in rule.parameters:
        raise ValueError(
            f"Merge method '{rule.name}' reads statistics in each model's own order of units, which align changes; run "
            "hf-atm align first, collect them on the aligned models, and merge those without align."
        )
    if rule.requires_base and not has_base:
        free = [name for name in list_merge_methods() if _on_weights(get_merge_method(name))]
        raise ValueError(
            f"Merge method '{rule.name}' merges task vectors, and models from different starts have no common base; name "
            f"one of the models as base_model, or use {', '.join(free)}."
        )


def _on_weights(rule: MergeMethod) -> bool:
    return not rule.requires_base and "statistics" not in rule.parameters


class Aligned(LazyTensors):
    """
    A checkpoint in the order of another one's units; each tensor is reordered when it is read.

    Args:
        tensors (`Mapping[str, Tensor]`): the checkpoint.
        order (`Permutation`): from its own order to the other one.
    """

    def __init__(self, tensors: Mapping[str, Tensor], order: Permutation) -> None:
        self.tensors, self.order = tensors, order

    def __getitem__(self, key: str) -> Tensor:
        return self.order.apply({key: self.tensors[key]})[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> torch.Size:
        return self.tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def chunk(self, key: str, start: int, stop: int) -> Tensor:
        return flat(self[key])[start:stop]


def align_inputs(job: Job, output: Path, processes: Processes, device: str | None) -> Alignment:
    """
    Aligns all inputs of a merge, the base among them; an interrupted merge's own maps are read again.

    Args:
        job (`Job`): the merge.
        output (`Path`): its destination.
        processes (`Processes`): who else works on it; the first aligns, and tells the others.
        device (`str`, *optional*): where to multiply.

    Returns:
        [`Alignment`]: of the models, then the base, without their state dicts; its report has the objective `before`.
    """
    from ...alignment import Alignment
    from ...alignment.checkpoints import align_checkpoints

    found: dict[str, Alignment] = {}

    def work() -> None:
        saved = staging_folder(output) / MAPS_NAME
        if saved.is_file() and is_resumable(output, job.identity()):
            found["alignment"] = Alignment.load(saved)
            return
        names = _labels(job)
        aligned = align_checkpoints(job.readers, names, device=device, **job.recipe.align)
        found["alignment"] = replace(aligned, state_dicts=())

    processes.on_main(work)
    return processes.union(found)["alignment"]


def check_inputs(job: Job) -> None:
    """Refuses, without aligning, what [`align_inputs`] would refuse; reads all weights once."""
    from ...alignment.checkpoints import open_checkpoints

    open_checkpoints(job.readers, _labels(job), job.recipe.align.get("heads"))


def in_one_frame(
    inputs: Sequence[Mapping[str, Tensor]], alignment: Alignment | None, frame: int
) -> list[Mapping[str, Tensor]]:
    """The inputs in the order of one of them; those that lie in it, as they are."""
    if alignment is None:
        return list(inputs)
    orders = [alignment.map(place, frame) for place in range(len(inputs))]
    return [
        tensors if order.is_identity else Aligned(tensors, order)
        for tensors, order in zip(inputs, orders, strict=True)
    ]


def alignment_facts(job: Job) -> dict[str, Any]:
    """What a record says of a merge's alignment, JSON-ready; empty without one."""
    found = job.alignment
    if found is None:
        return {}
    labels = _labels(job)
    return {
        "method": job.recipe.align["method"],
        "recipe": job.recipe.align,
        "frame": labels[job.frame],
        "objective_before": found.report["before"],
        "objective_after": found.objective,
        "units": sum(found.spec.variables.values()),
        "moved": {
            label: found.map(place, job.frame).moved for place, label in enumerate(labels) if place != job.frame
        },
    }


def alignment_memory(job: Job, workers: int) -> tuple[int, int]:
    """Estimated bytes that aligning the inputs takes, which holds them all, and that reading them in order adds later."""
    sizes = [max(reader[key].nbytes for key in reader) for reader in job.readers]
    entries = sum(reader[key].numel() for reader in job.readers for key in reader)
    return 4 * _COPIES * entries, workers * (sum(sizes) - sizes[job.frame])


def _labels(job: Job) -> list[str]:
    recipe = job.recipe
    return [*(model.name for model in recipe.models), *([recipe.base_model] if recipe.base_model is not None else [])]
