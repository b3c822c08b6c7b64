"""Results of single runs, kept as JSON so that an interrupted benchmark goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_atm.checkpoint import write_json
from hf_atm.identity import as_json


class Cells:
    """Runs what is not there yet.

    Args:
        folder (`Path`): Takes a file per cell.
        settings (`dict`): What decides every result; a cell of other settings is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def result(self, name: str, run: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """The result kept under `name`, or that of `run`; `settings` are the cell's own."""
        path = self.folder / f"{name}.json"
        identity = as_json({**self.settings, **settings})
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if kept is not None and kept["identity"] != identity:
            raise SystemExit(f"{path} was made with other settings; delete it, or choose another --output.")
        if kept is None:
            kept = {"identity": identity, "result": run()}
            write_json(path, kept)
        return kept["result"]
