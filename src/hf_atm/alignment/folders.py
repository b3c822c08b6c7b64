"""Finished models on disk, aligned into folders that any merge takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import save_torch_state_dict

from ..merging.checkpoints.reader import CheckpointReader, is_adapter, resolve_model
from ..merging.checkpoints.side_files import copy_side_files, list_side_files
from .checkpoints import align_checkpoints
from .matching import check_device
from .result import Alignment


MAPS_NAME = "alignment.safetensors"
REPORT_NAME = "alignment.json"
# Says that an unfinished output is ours to remove.
_OURS = ".hf-atm"


def align_folders(
    models: Sequence[str],
    output_dir: str | os.PathLike,
    names: Sequence[str],
    method: str = "c2m3",
    heads: Sequence[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    copy_code: bool = False,
) -> Alignment:
    """
    Aligns checkpoints of one family by their weights, and writes each, with its side files, into a folder of its own.

    Args:
        models (`Sequence[str]`): at least two folders or Hub ids; not changed.
        output_dir (`str` or `PathLike`): takes `<name>/` for each model, the maps (`alignment.safetensors`, for
            [`Alignment.load`]) and `alignment.json`. Must not exist yet, or be empty; it appears when it is whole.
        names (`Sequence[str]`): the models' folders, all different.
        method (`str`, *optional*, defaults to `"c2m3"`): `"c2m3"`, `"git-rebasin"` or `"merge-many"`; see [`align`].
        heads, device, seed (*optional*): as in [`align`].
        copy_code (`bool`, *optional*, defaults to `False`): whether Python files are copied as well.

    Returns:
        [`Alignment`]

    Raises:
        `FileNotFoundError`: for a model that is not there.
        `KeyError`, `ValueError`: for adapters, families that differ or have no specification, an output that holds
            something, and what [`align`] refuses.

    Cost: all models lie in memory, twice.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Output {str(output)!r} holds something already; name another folder.")
    if any(parent.exists() and not parent.is_dir() for parent in output.parents):
        raise ValueError(f"Output {str(output)!r} lies below a file; name another folder.")
    beside = output.with_name(f"{output.name}.incomplete")
    if beside.exists() and not (beside / _OURS).is_file():
        raise ValueError(f"{str(beside)!r} is in the way, where the output is made; move it, or name another folder.")
    check_device(device)
    reserved = ("", ".", "..", MAPS_NAME, REPORT_NAME, _OURS)
    wrong = [name for name in names if name in reserved or "/" in name or "\\" in name]
    if wrong or len(names) != len(models) or len(set(names)) != len(names):
        raise ValueError(f"{len(models)} models need as many different folder names, not {list(names)}.")
    folders = [resolve_model(model) for model in models]
    for model, folder in zip(models, folders, strict=True):
        if is_adapter(folder):
            raise ValueError(f"{model!r} is an adapter; merge it into its base model first.")
    readers = [CheckpointReader(folder) for folder in folders]
    found = align_checkpoints(readers, models, method=method, heads=heads, device=device, seed=seed)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        (beside / _OURS).touch()
        for name, folder, state in zip(names, folders, found.state_dicts, strict=True):
            target = beside / name
            target.mkdir(parents=True)
            save_torch_state_dict(state, target)
            copy_side_files(folder, target, list_side_files(folder, copy_code)[0])
        found.save(beside / MAPS_NAME)
        facts = {"models": dict(zip(names, models, strict=True)), "method": method, "objective": found.objective}
        text = json.dumps({**facts, "seed": seed, **found.report}, indent=2, default=str)
        (beside / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
        (beside / _OURS).unlink()
        if output.is_dir():
            output.rmdir()
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return found
