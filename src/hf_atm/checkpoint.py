"""Checkpoints that are whole or absent: written beside, renamed when complete, found again after a crash."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_NAME = "atm_state.json"
TENSORS_NAME = "atm_state.safetensors"
REPORT_NAME = "atm_report.json"
# The Hub upload of Trainer leaves out names that start with an underscore.
STAGING_NAME = "_staging"
_COMPLETE = "complete"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


@contextmanager
def staged_checkpoint(run_dir: str, name: str, writes: bool, barrier: Callable[[], None]) -> Iterator[str]:
    """Write a checkpoint into a staging folder and rename it when the block ends without an error.

    Args:
        run_dir (`str`): folder that holds the checkpoints.
        name (`str`): name of the checkpoint, such as `"checkpoint-120"`.
        writes (`bool`): whether this process renames (one per file system).
        barrier (`Callable`): waits for all processes.

    Yields:
        `str`: the staging folder, in which `name` is to be written.
    """
    staging = Path(run_dir, STAGING_NAME)
    if writes:
        shutil.rmtree(staging, ignore_errors=True)
    barrier()
    try:
        yield str(staging)
    except BaseException:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    barrier()
    if writes:
        (staging / _COMPLETE).touch()
        _publish(staging, Path(run_dir, name))
    barrier()


def _publish(staging: Path, final: Path) -> None:
    if final.exists():
        os.rename(final, staging / "replaced")
    os.rename(staging / final.name, final)
    shutil.rmtree(staging)


def recover(run_dir: str) -> None:
    """Finish or discard what a killed process left in the staging folder."""
    staging = Path(run_dir, STAGING_NAME)
    if not staging.is_dir():
        return
    for checkpoint in staging.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (staging / _COMPLETE).exists():
            _publish(staging, Path(run_dir, checkpoint.name))
    shutil.rmtree(staging, ignore_errors=True)


def checkpoints(run_dir: str) -> list[str]:
    """Complete checkpoints of a run, oldest first; folders without the loop's state do not count."""
    if not os.path.isdir(run_dir):
        return []
    found = []
    for path in Path(run_dir).iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and (path / STATE_NAME).is_file():
            found.append((int(match[1]), str(path)))
    return [path for _, path in sorted(found)]


def traces_of_a_run(run_dir: str) -> list[str]:
    """Names in a folder that show that a run has written there."""
    if not os.path.isdir(run_dir):
        return []
    return sorted(name for name in os.listdir(run_dir) if _CHECKPOINT.fullmatch(name) or name == REPORT_NAME)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON beside and rename; NaN becomes null, so that any reader can parse the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def save_state(folder: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the loop's part of a checkpoint into `folder` (which is staged, so no rename is needed here)."""
    os.makedirs(folder, exist_ok=True)
    if tensors:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, os.path.join(folder, TENSORS_NAME))
    with open(os.path.join(folder, STATE_NAME), "w", encoding="utf-8") as file:
        json.dump(values, file)


def load_values(folder: str) -> dict[str, Any]:
    """The loop's JSON values of a checkpoint.

    Raises:
        ValueError: when the folder is no checkpoint of this loop.
    """
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} holds no {STATE_NAME}, so it is not a complete checkpoint of an ATM run; pass another folder, "
            "or resume_from_checkpoint=True for the last complete one."
        )
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def load_tensors(folder: str) -> dict[str, Tensor]:
    """The loop's tensors of a checkpoint; empty when it needed none."""
    path = os.path.join(folder, TENSORS_NAME)
    return load_file(path) if os.path.isfile(path) else {}
