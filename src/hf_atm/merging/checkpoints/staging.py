"""A merge in progress: written beside its destination, resumed after a kill, renamed when whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash


STATE_NAME = "merge_in_progress.json"
RECORD_NAME = "merge_config.json"
SCRATCH_NAME = "vectors.scratch"


def staging_folder(output: Path) -> Path:
    """Where a merge for `output` is put together."""
    return output.with_name(f"{output.name}.incomplete")


def check_output(output: Path, overwrite: bool) -> None:
    """
    Refuses an output folder that holds something else than what may be replaced.

    Raises:
        `ValueError`: if it is a file, or holds files and `overwrite` is off, or holds something that no merge wrote; or
            if the folder in which the merge is to be put together belongs to someone else.
    """
    if output.is_file():
        raise ValueError(f"Output {str(output)!r} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()):
        merged = (output / RECORD_NAME).is_file()
        if not (merged and overwrite):
            way_out = "pass overwrite=True to replace that merge" if merged else "name another folder"
            raise ValueError(f"Output {str(output)!r} already holds {_some(output)}; {way_out}.")
    staging = staging_folder(output)
    if staging.exists() and (
        not staging.is_dir() or (any(staging.iterdir()) and not (staging / STATE_NAME).is_file())
    ):
        raise ValueError(f"{str(staging)!r} is in the way and no merge wrote it; move it or name another output.")


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
    state = staging / STATE_NAME
    text = json.dumps(identity, sort_keys=True)
    if state.is_file() and state.read_text(encoding="utf-8") == text:
        return staging, True
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    beside = staging / f"{STATE_NAME}.tmp"
    beside.write_text(text, encoding="utf-8")
    return staging, False


def confirm_staging(staging: Path) -> None:
    """Marks a new staging folder as complete enough to be resumed: its files exist with their headers."""
    os.replace(staging / f"{STATE_NAME}.tmp", staging / STATE_NAME)


def publish(staging: Path, output: Path) -> None:
    """Gives a finished merge its final name; an earlier merge of that name goes away last."""
    for name in (STATE_NAME, SCRATCH_NAME):
        (staging / name).unlink(missing_ok=True)
    for journal in staging.glob("done-*.jsonl"):
        journal.unlink()
    if output.exists():
        old = output.with_name(f"{output.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(output, old)
        os.rename(staging, output)
        shutil.rmtree(old)
    else:
        os.rename(staging, output)


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
        self._file = open(staging / f"done-{rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

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


def _some(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
