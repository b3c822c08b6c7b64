"""What a run adds to its host's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


_HEADING = "## What each task keeps to itself"


def add_private_section(output_dir: str, patterns: Sequence[str], sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Adds a table of private parameters to the card in `output_dir`, in place of an earlier one.

    Args:
        output_dir (`str`): where `README.md` lies; nothing happens without one.
        patterns (`Sequence[str]`): `task_specific_modules`.
        sizes (`Mapping[str, Mapping[str, int]]`): per task, parameters of its `head` and of its `modules`.
    """
    path = Path(output_dir) / "README.md"
    if not path.is_file() or not any(sum(parts.values()) for parts in sizes.values()):
        return
    text = path.read_text(encoding="utf-8").split(f"\n{_HEADING}")[0].rstrip()
    lines = [
        _HEADING,
        "",
        "All other parameters are shared, and were merged after every round.",
        "",
        "| task | head | private modules |",
        "|---|---|---|",
        *(f"| {task} | {parts['head']:,} | {parts['modules']:,} |" for task, parts in sizes.items()),
    ]
    if patterns:
        lines += [
            "",
            "Private modules are the backbone's parameters that match " + ", ".join(f"`{p}`" for p in patterns) + ".",
        ]
    beside = path.with_suffix(".tmp")
    beside.write_text(f"{text}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)
