"""A merged adapter on disk: whole or absent, and saying how it was made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from ..card import MergedModel, MergeFacts, merge_card
from .reading import WEIGHTS_NAME


if TYPE_CHECKING:
    from .result import AdapterMerge

RECORD_NAME = "merge_config.json"
UPDATE_NAME = "update.safetensors"
SAVED_NAME = "saved_modules.safetensors"
TASKS_NAME = "tasks"


def check_folder(folder: str | os.PathLike) -> None:
    """
    Refuses to write over anything but an earlier result.

    Raises:
        ValueError: naming the folder and the way out.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD_NAME).is_file():
        raise ValueError(f"The folder {str(folder)!r} holds something else; name another one, or empty it.")


def check_task_names(names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: for task names that cannot be folders of separate heads.
    """
    wrong = [name for name in names if name in ("", ".", "..") or any(mark in name for mark in "/\\#")]
    if wrong:
        raise ValueError(
            f"The task names {wrong} are no folder names; give names= to merge_adapters, or names in the recipe."
        )


def write_folder(result: AdapterMerge, folder: str | os.PathLike) -> None:
    """Writes a result, see [`AdapterMerge.save_pretrained`]."""
    check_folder(folder)
    check_task_names(result.heads)
    with _replaced(Path(folder)) as beside:
        if result.config is not None:
            _write_adapter(beside, result.config, result.state_dict())
        elif result.saved:
            _write_tensors(beside / SAVED_NAME, result.saved)
        for task, head in result.heads.items():
            place = beside / TASKS_NAME / task
            place.mkdir(parents=True)
            if result.config is not None:
                _write_adapter(place, result.head_configs[task], result.state_dict(task))
            else:
                _write_tensors(place / SAVED_NAME, head)
        if result.deltas:
            _write_tensors(beside / UPDATE_NAME, result.deltas)
        versions = _versions()
        record = {**result.report, "versions": versions}
        # Statistics and the like are named, not copied.
        text = json.dumps(record, indent=2, allow_nan=False, default=lambda value: f"<{type(value).__name__}>")
        (beside / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
        (beside / "README.md").write_text(merge_card(_facts(result, Path(folder).name, versions)), encoding="utf-8")


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder beside the final one, renamed to it when the block ends well and removed when it does not."""
    folder = folder.absolute()
    beside, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        # A process was killed between the two renames below.
        os.rename(old, folder)
    if old.is_dir() and any(old.iterdir()) and not (old / RECORD_NAME).is_file():
        raise ValueError(f"{str(old)!r} is in the way and no merge wrote it; move it or name another folder.")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_adapter(folder: Path, config: Any, state: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(folder))
    _write_tensors(folder / WEIGHTS_NAME, state)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, since tensors that share memory cannot be saved.
    whole = {name: tensors[name].detach().cpu().clone().contiguous() for name in sorted(tensors)}
    save_file(whole, path, metadata={"format": "pt"})


def _versions() -> dict[str, str]:
    found = {}
    for package in ("hf-atm", "peft", "safetensors", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _facts(result: AdapterMerge, name: str, versions: Mapping[str, str]) -> MergeFacts:
    report, notes = result.report, []
    if result.heads:
        notes.append(f"Each folder in `{TASKS_NAME}` is the same adapter with the head of one task.")
    if result.deltas:
        notes.append(f"`{UPDATE_NAME}` holds updates that are added to the base model's weights of the same names.")
    load = f'from safetensors.torch import load_file\n\nupdate = load_file("{UPDATE_NAME}")'
    return MergeFacts(
        name=name,
        method=report["method"],
        inputs=[
            MergedModel(entry["name"], entry["source"], entry["weight"], entry["sha256"]) for entry in report["inputs"]
        ],
        base=result.config.base_model_name_or_path if result.config is not None else None,
        parameters=report["parameters"],
        versions=versions,
        is_adapter=True,
        usage="" if result.config is not None else load,
        record=RECORD_NAME,
        notes=notes,
    )
