"""Is what was written what was meant? Checked before it gets its final name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .layout import Layout
from .reader import CheckpointReader


def check_files(folder: Path, layout: Layout) -> None:
    """
    Opens the written checkpoint again and compares it, tensor by tensor, with the layout: names, shapes, types, index.

    Raises:
        `RuntimeError`: naming what differs.
    """
    try:
        reader = CheckpointReader(folder)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"The merged checkpoint cannot be opened: {error}") from error
    if sorted(reader) != sorted(layout.tensors):
        odd = sorted(set(reader) ^ set(layout.tensors))
        raise RuntimeError(
            f"The merged checkpoint has {len(reader)} tensors instead of {len(layout.tensors)}: {odd[:5]}."
        )
    for key, planned in layout.tensors.items():
        tensor = reader[key]
        if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
            raise RuntimeError(
                f"Tensor '{key}' was written as {tensor.dtype} {tuple(tensor.shape)} instead of {planned.dtype} "
                f"{tuple(planned.shape)}."
            )


def same_structure(layout: Layout, reference: CheckpointReader) -> bool:
    """Whether a result has exactly the names and shapes of the checkpoint whose configuration it takes over."""
    return {key: tensor.shape for key, tensor in layout.tensors.items()} == {
        key: reference[key].shape for key in reference
    }


def check_reload(folder: Path, reference: Path) -> str:
    """
    Loads the merged model as transformers does, without memory for its weights, and compares the names with the files'.

    Names that are missing or left over count only if they are not so in the reference too.

    Args:
        folder (`Path`): the merged checkpoint.
        reference (`Path`): the checkpoint whose configuration it has.

    Returns:
        `str`: the class that loaded it, or why none could be tried.

    Raises:
        `RuntimeError`: if weights would be newly initialised, ignored, or have other shapes.
    """
    config = folder / "config.json"
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    if not architectures:
        return "not reloaded: config.json names no architecture"
    import transformers

    loader = getattr(transformers, architectures[0], None)
    if loader is None:
        return f"not reloaded: {architectures[0]} is no class of transformers"
    found, expected = _loading_info(loader, folder), _loading_info(loader, reference)
    for kind, names in found.items():
        odd = sorted(names - expected[kind])
        if odd:
            raise RuntimeError(f"{architectures[0]} reports {kind.replace('_', ' ')} for the merged model: {odd[:5]}.")
    return architectures[0]


def _loading_info(loader: Any, folder: Path) -> dict[str, set[str]]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        _, info = loader.from_pretrained(folder, device_map="meta", output_loading_info=True, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {kind: {str(name) for name in info.get(kind, ())} for kind in kinds}
