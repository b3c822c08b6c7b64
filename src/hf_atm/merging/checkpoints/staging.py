"""A merge in progress: written beside its destination, resumed after a kill, renamed when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash


STATE_NAME = "merge_in_progress.json"
RECORD_NAME = "merge_config.json"
SCRATCH_NAME = "vectors.scratch"
STAGING_SUFFIX = ".incomplete"

# The state of a merge whose files do not all exist yet.
_NEW_STATE = f"{STATE_NAME}.tmp"


def staging_folder(output: Path) -> Path:
    """Where a merge for `output` is put together."""
    return output.with_name(f"{output.name}{STAGING_SUFFIX}")


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """
    Refuses an output folder that holds something else than what may be replaced.

    Args:
        output (`Path`): the folder, resolved.
        overwrite (`bool`): whether an earlier merge there may be replaced.
        inputs (`Sequence[Path]`, *optional*): folders of the models, in which no output may lie.

    Raises:
        `ValueError`: if it is a file, a mount point, or lies in an input; if it holds files and `overwrite` is off, or
            holds something that no merge wrote; or if a folder that the merge needs beside it belongs to someone else.
    """
    if output.name == "" or output.is_mount():
        raise ValueError(f"Output {str(output)!r} cannot be renamed; name a folder in it.")
    if output.is_file():
        raise ValueError(f"Output {str(output)!r} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()):
        merged = (output / RECORD_NAME).is_file()
        if not (merged and overwrite):
            way_out = "pass overwrite=True to replace that merge" if merged else "name another folder"
            raise ValueError(f"Output {str(output)!r} already holds {_some(output)}; {way_out}.")
    for folder in inputs:
        if folder.resolve() in (output, *output.parents):
            raise ValueError(f"Output {str(output)!r} lies in the model {str(folder)!r}; name a folder outside of it.")
    for beside, marks in (
        (staging_folder(output), (STATE_NAME, _NEW_STATE, RECORD_NAME)),
        (_old(output), (RECORD_NAME,)),
    ):
        ours = beside.is_dir() and (not any(beside.iterdir()) or any((beside / mark).is_file() for mark in marks))
        if beside.exists() and not ours:
            raise ValueError(f"{str(beside)!r} is in the way and no merge wrote it; move it or name another output.")


def is_resumable(output: Path, identity: dict[str, Any]) -> bool:
    """Whether an interrupted merge of the same inputs left its work beside `output`."""
    state = staging_folder(output) / STATE_NAME
    return state.is_file() and state.read_text(encoding="utf-8") == json.dumps(identity, sort_keys=True)


def open_staging(output: Path, identity: dict[str, Any]) -> tuple[Path, bool]:
    """
    Makes the staging folder, or finds the one that an interrupted merge of the same inputs left.

    Args:
        output (`Path`): the destination.
        identity (`dict`): recipe, inputs and layout; JSON-ready. A staging folder of anything else is thrown away.

    Returns:
        `tuple[Path, bool]`: the folder, and whether it holds work to continue.
    """
    staging = staging_folder(output)
    if is_resumable(output, identity):
        return staging, True
    text = json.dumps(identity, sort_keys=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / _NEW_STATE).write_text(text, encoding="utf-8")
    return staging, False


def confirm_staging(staging: Path) -> None:
    """Marks a new staging folder as complete enough to be resumed: its files exist with their headers."""
    os.replace(staging / _NEW_STATE, staging / STATE_NAME)


def publish(staging: Path, output: Path) -> None:
    """Gives a finished merge its final name; an earlier merge of that name goes away last."""
    old = _old(output)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(output, old)
    os.rename(staging, output)
    # Until here a kill leaves a merge that the same command finishes; from here on it is whole under its name.
    for name in (STATE_NAME, SCRATCH_NAME, *(journal.name for journal in output.glob("done-*.jsonl"))):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


class Journal:
    """What is done already, one line of JSON per step, so that a killed merge goes on where it was.

    A line counts only when it is whole. Every process writes its own file; all are read when a merge is opened.
    """

    def __init__(self, staging: Path, rank: int) -> None:
        self.entries: dict[tuple[str, str], dict[str, Any]] = {}
        for file in sorted(staging.glob("done-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                self.entries[entry["phase"], entry["key"]] = entry
        path = staging / f"done-{rank}.jsonl"
        cut = path.is_file() and path.read_text(encoding="utf-8")[-1:] not in ("", "\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if cut:
            # A kill cut the last line; the next one must not continue it.
            self._file.write("\n")

    def add(self, phase: str, key: str, **facts: Any) -> None:
        """Notes that a step is done; one write, so that lines of several threads do not mix."""
        entry = {"phase": phase, "key": key, **facts}
        self.entries[phase, key] = entry
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def get(self, phase: str, key: str) -> dict[str, Any] | None:
        """The facts of a finished step."""
        return self.entries.get((phase, key))

    def close(self) -> None:
        self._file.close()


def digest_region(path: Path, start: int, nbytes: int) -> str:
    """XXH3-128 of a part of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        handle.seek(start)
        while nbytes > 0:
            block = handle.read(min(nbytes, 1 << 22))
            if not block:
                break
            digest.update(block)
            nbytes -= len(block)
    return digest.hexdigest()


def _old(output: Path) -> Path:
    """Where an earlier merge waits while the new one takes its name."""
    return output.with_name(f"{output.name}.replaced")


def _some(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
