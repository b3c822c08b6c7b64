"""Checkpoints on disk as models to align: their family, their specification, their agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..merging.checkpoints.reader import CheckpointReader
from ..merging.tensors import CHUNK
from .inputs import check_models, read_models, with_heads
from .matching import align
from .registry import spec_for_config
from .result import Alignment
from .spec import PermutationSpec


def open_checkpoints(
    readers: Sequence[CheckpointReader], names: Sequence[str], heads: Sequence[str] | None = None
) -> tuple[list[dict[str, Tensor]], PermutationSpec, list[str]]:
    """
    Reads and checks checkpoints of one family.

    Args:
        readers (`Sequence[CheckpointReader]`): the checkpoints, at least two.
        names (`Sequence[str]`): what to call them in messages.
        heads (`Sequence[str]`, *optional*): as in [`align`].

    Returns:
        `tuple`: the state dicts, memory-mapped; their specification; names of the tensors to match.

    Raises:
        `FileNotFoundError`: for a checkpoint without `config.json`.
        `KeyError`, `ValueError`: for families that differ or have no specification, and what [`align`] refuses.
    """
    config = _shared_config([reader.path for reader in readers], names)
    states = read_models([dict(reader) for reader in readers])
    spec = spec_for_config(config, sorted({name for state in states for name in state}))
    spec = with_heads(spec, heads, states)
    return states, spec, check_models(states, spec)


def align_checkpoints(readers: Sequence[CheckpointReader], names: Sequence[str], **options: Any) -> Alignment:
    """
    Aligns checkpoints of one family by their weights.

    A checkpoint that is listed twice counts once, so that it does not outweigh the others.

    Args:
        readers, names: as in [`open_checkpoints`].
        **options: of [`align`].

    Returns:
        [`Alignment`]: as [`align`] gives it; its report also has the objective `before`.
    """
    places = [[str(file.resolve()) for file in reader.files] for reader in readers]
    first = [places.index(place) for place in places]
    distinct = sorted(set(first))
    states, spec, matched = open_checkpoints(
        [readers[index] for index in distinct], [names[index] for index in distinct], options.get("heads")
    )
    found = align(states, spec, **{**options, "heads": None})
    position = [distinct.index(index) for index in first]
    return replace(
        found,
        permutations=[found.permutations[index] for index in position],
        state_dicts=[found.state_dicts[index] for index in position],
        report={**found.report, "before": agreement(states, matched)},
    )


def agreement(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> float:
    """
    The sum over pairs of models of the inner products of the named tensors as they are, in float64.

    Args:
        states (`Sequence[Mapping[str, Tensor]]`): the models.
        names (`Sequence[str]`): tensors that all of them have, in one shape.
    """
    value = 0.0
    for name in names:
        rows = [state[name].detach().reshape(-1) for state in states]
        for start in range(0, rows[0].numel(), CHUNK):
            pieces = [row[start : start + CHUNK].double().cpu() for row in rows]
            squares = sum(float(piece.dot(piece)) for piece in pieces)
            total = sum(pieces[1:], pieces[0])
            value += 0.5 * (float(total.dot(total)) - squares)
    return value


def _shared_config(folders: Sequence[Path], names: Sequence[str]) -> Any:
    """The configuration that all models share, as far as their kind goes."""
    # A multi-task model's configuration is known once its class is.
    from transformers import AutoConfig

    from .. import MultiTaskConfig  # noqa: F401

    configs = []
    for name, folder in zip(names, folders, strict=True):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name!r} holds no config.json, which says how its units are connected.")
        configs.append(AutoConfig.from_pretrained(folder))
    types = list(dict.fromkeys(config.model_type for config in configs))
    if len(types) > 1:
        raise ValueError(f"The models are of different types ({', '.join(types)}); align models of one family.")
    return configs[0]
