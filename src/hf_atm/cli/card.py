"""`hf-atm card`: pictures and the model card of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..hub import written_by_hf_atm
from ..model_card import write_card


def card(run: str, options: Any, quiet: bool = False) -> int:
    """Writes `figures/` and `README.md` into a run's folder.

    Args:
        run (`str`): Its `output_dir`.
        options (`argparse.Namespace`): The command's options.
        quiet (`bool`, *optional*, defaults to `False`): Print nothing.

    Returns:
        `int`: 0.
    """
    check_replaceable(Path(run), options.overwrite)
    levels = None if options.levels is None else read_levels(Path(options.levels))
    write_card(Path(run), options.name, options.repository, levels, options.license, options.language)
    if not quiet:
        print(f"{run}/README.md, and its pictures in {run}/figures")
    return 0


def check_replaceable(run: Path, overwrite: bool) -> None:
    """Refuses to write over a card that somebody wrote by hand.

    Raises:
        ValueError: naming the file and the way out.
    """
    path = run / "README.md"
    if overwrite or not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if written_by_hf_atm(text) is None and "generated_from_trainer" not in text:
        raise ValueError(f"{str(path)!r} was not written by a program; move it, or replace it with --overwrite.")


def read_levels(path: Path) -> dict[str, dict[str, float]]:
    """Scores of other methods: a JSON object `{name: {task: score}}`, or the `comparison.json` of `hf-atm compare`.

    Raises:
        ValueError: when the file is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in content:
            rows = {name: row["validation"]["tasks"] for name, row in content["rows"].items() if "validation" in row}
        else:
            rows = content
        return {name: {task: float(score) for task, score in scores.items()} for name, scores in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--levels {str(path)!r} must hold {{name: {{task: score}}}} or be a comparison.json ({error})."
        ) from error
