"""Methods side by side: equal budgets, several seeds, one table, one figure, one JSON file."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..checkpoint import write_json
from ..identity import claim, require_one_process
from .cells import CELL_NAME, IDENTITY_NAME, Suite, build_trainer, identity_of, run_cell
from .figure import draw
from .members import Member, check_budgets
from .summary import markdown_table, summarize


_VERSIONS = ("hf-atm", "torch", "transformers", "peft", "accelerate", "datasets")
RESULT_NAME, TABLE_NAME, FIGURE_NAME = "comparison.json", "comparison.md", "comparison.png"


def compare(
    suite: Suite,
    members: Sequence[Member],
    seeds: Sequence[int],
    steps: int,
    output_dir: str | os.PathLike,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs every member with every seed and puts the results together.

    What is done already is not done again: finished cells are read from `output_dir/cells`, an interrupted one goes
    on from its last checkpoint.

    Args:
        suite ([`Suite`]): model and data.
        members (`Sequence[Member]`): the methods, from [`parse_members`].
        seeds (`Sequence[int]`): one run of each member per seed.
        steps (`int`): optimizer steps per task of each run.
        output_dir (`str` or `os.PathLike`): takes `comparison.json`, `comparison.md` and `comparison.png`.
        report (`Callable[[str], None]`, *optional*): is told a line after each cell.

    Returns:
        `dict`: what `comparison.json` holds: `rows` from [`summarize`], `cells` by seed and member, `steps`, `seeds`,
        `tasks`, `versions`.

    Raises:
        ValueError: before anything runs, when members differ in budget, seeds repeat or a task has no validation data.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, not {list(seeds)}.")
    names = [member.name for member in members]
    if len({_folder_name(name) for name in names}) != len(names):
        raise ValueError(f"The members' names must differ, in letters and digits too: {', '.join(names)}.")
    common = {
        key: getattr(suite.args, key)
        for key in ("num_rounds", "per_device_train_batch_size", "gradient_accumulation_steps")
    }
    settings = check_budgets(members, list(suite.train), common, steps)
    require_one_process("A comparison")
    if suite.trainer_kwargs.get("compute_metrics") is None:
        raise ValueError("A comparison needs compute_metrics, whose first metric is what methods are compared by.")
    blind = [task for task in suite.train if task not in (suite.validation or {})]
    if blind:
        raise ValueError(f"Task {blind[0]!r} has no validation data, by which methods are compared; give it some.")
    output = Path(output_dir)
    folders = {
        (member.name, seed): output / "cells" / _folder_name(member.name) / f"seed-{seed}"
        for member in members
        for seed in seeds
    }
    for member in members:
        _check(suite, member, settings[member.name], {seed: folders[member.name, seed] for seed in seeds})
    cells: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        for member in members:
            cell = run_cell(suite, member, settings[member.name], seed, folders[member.name, seed])
            cells.setdefault(seed, {})[member.name] = cell
            report(_line(member.name, seed, cell))
            # After each cell, so that a long comparison can be looked at while it runs.
            result = _write(output, cells, seeds, steps, sorted(suite.train))
    draw(cells, result["rows"], output / FIGURE_NAME)
    return result


def _check(suite: Suite, member: Member, settings: Mapping[str, Any], folders: Mapping[int, Path]) -> None:
    """Refuse what could not run, or belongs to other settings, before the first member takes hours."""
    for seed, folder in folders.items():
        if (folder / IDENTITY_NAME).is_file():
            claim(folder / IDENTITY_NAME, identity_of(suite, member, settings, seed))
    missing = [seed for seed, folder in folders.items() if not (folder / CELL_NAME).is_file()]
    if missing:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                build_trainer(suite, member, settings, missing[0], Path(scratch))
            except (ValueError, KeyError) as error:
                message = error.args[0] if error.args else error
                raise type(error)(f"compare.members.{member.name}: {message}") from error


def _write(
    output: Path, cells: Mapping[int, Any], seeds: Sequence[int], steps: int, tasks: Sequence[str]
) -> dict[str, Any]:
    rows = summarize(cells)
    result = {
        "tasks": list(tasks),
        "steps": steps,
        "seeds": list(seeds),
        "rows": rows,
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "cells": cells,
    }
    write_json(output / RESULT_NAME, result)
    parts = [part for part in ("test", "validation") if any(part in row for row in rows.values())]
    text = "\n\n".join(f"## {part.capitalize()}\n\n{markdown_table(rows, part)}" for part in parts)
    beside = output / f"{TABLE_NAME}.tmp"
    beside.write_text(f"{text}\n", encoding="utf-8")
    beside.replace(output / TABLE_NAME)
    return result


def _folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "member"


def _line(name: str, seed: int, cell: Mapping[str, Any]) -> str:
    parts = [f"{name}, seed {seed}:"]
    for row, values in cell["rows"].items():
        if "failed" in values:
            parts.append(f"failed ({values['failed']})")
            continue
        scores = values["validation"]
        label = "" if row == name else f"{row} "
        parts.append(f"{label}{sum(scores.values()) / len(scores):.3f}")
    return " ".join(parts)
