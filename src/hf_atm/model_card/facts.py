"""Everything a card says, read from the files of a finished run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME

from ..checkpoint import REPORT_NAME


_WEIGHTS = ("*.safetensors", "tasks/*/*.safetensors", "adapters/*/*.safetensors")


@dataclass
class CardFacts:
    """What is known of a run.

    Args:
        name (`str`): what to call the model.
        report (`dict`): `atm_report.json`.
        config (`dict`): `config.json`, or `adapter_config.json`; empty for a module without a configuration.
        test (`dict`): `test_metrics.json`, empty without one.
        exports (`dict[str, str]`): class of the stock model of each task that has one in `tasks/`.
        adapters (`list[str]`): tasks with an adapter in `adapters/`.
        hashes (`dict[str, str]`): SHA-256 of the weight files, by relative path.
        levels (`dict[str, Mapping[str, float]]`): scores of other methods by name and task, to compare with.
    """

    name: str
    report: dict[str, Any]
    config: dict[str, Any]
    test: dict[str, float] = field(default_factory=dict)
    exports: dict[str, str] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    levels: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def run(self) -> dict[str, Any]:
        """What [`run_facts`] wrote."""
        return self.report["run"]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The records of all rounds."""
        return self.report["rounds"]

    @property
    def tasks(self) -> list[str]:
        """All tasks, sorted."""
        return list(self.run["examples"])

    @property
    def scored(self) -> dict[str, Any] | None:
        """The record of the round whose weights were kept, if it was evaluated."""
        kept = [record for record in self.rounds if record["global_step"] == self.run["kept_step"]]
        return kept[0] if kept and kept[0]["scores"] else None

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter rather than a whole model."""
        return "peft_type" in self.config

    def test_scores(self) -> dict[str, float]:
        """Each task's first metric on test data, where there are any."""
        record = self.scored
        names = record["metric_names"] if record else {}
        keys = {task: f"test_{task}_{name}" for task, name in names.items()}
        return {task: self.test[key] for task, key in keys.items() if key in self.test}


def read_facts(
    folder: Path, name: str | None = None, levels: Mapping[str, Mapping[str, float]] | None = None
) -> CardFacts:
    """
    Reads what a run left behind.

    Args:
        folder (`Path`): its `output_dir`.
        name (`str`, *optional*): what to call the model; the folder's name by default.
        levels (`Mapping`, *optional*): see [`CardFacts`].

    Raises:
        `FileNotFoundError`: when the folder, its report or its model is missing.
        `ValueError`: when the report is of an earlier version, or no JSON.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}; name the output_dir of a run.")
    report = _json(folder / REPORT_NAME, "it is no output_dir of a run; train first")
    if "run" not in report or not report.get("rounds"):
        raise ValueError(
            f"{str(folder / REPORT_NAME)!r} holds no finished round of this version; run the training again."
        )
    config_name = "adapter_config.json" if (folder / "adapter_config.json").is_file() else "config.json"
    # A module of one's own is saved as nothing but its weights.
    bare = not (folder / config_name).exists() and (folder / SAFE_WEIGHTS_NAME).is_file()
    config = {} if bare else _json(folder / config_name, "call trainer.save_model() first")
    test = folder / "test_metrics.json"
    return CardFacts(
        name=name or folder.resolve().name,
        report=report,
        config=config,
        test=_json(test, "") if test.is_file() else {},
        exports={
            path.parent.name: _json(path, "")["architectures"][0]
            for path in sorted(folder.glob("tasks/*/config.json"))
        },
        adapters=sorted(path.parent.name for path in folder.glob("adapters/*/adapter_config.json")),
        hashes={
            str(path.relative_to(folder)): _digest(path)
            for pattern in _WEIGHTS
            for path in sorted(folder.glob(pattern))
        },
        levels=dict(levels or {}),
    )


def _json(path: Path, way_out: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path.parent)!r} holds no {path.name}; {way_out}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON file: {error}.") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
