"""What makes one run differ from another: written beside results that are kept, so that they are never mistaken."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from .checkpoint import write_json


# Where a run writes, what it tells and how often changes nothing in its result.
_INCIDENTAL = (
    *("output_dir", "run_name", "report_to", "project", "trackio", "disable_tqdm", "round_table", "use_cpu", "do_"),
    *("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "resume_from", "enable_jit"),
    *("dataloader_pin", "dataloader_num", "num_train_epochs", "per_device_eval"),
)


def settings_of(args: Any) -> dict[str, Any]:
    """The settings that decide a run's result and differ from the defaults, as JSON has them."""
    # Making default arguments would be shorter, and would reset the device state of a run under way.
    defaults: dict[str, Any] = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args) if f.init
    }
    defaults["accelerator_config"] = AcceleratorConfig().to_dict()
    # The arguments take this one out as they are made.
    defaults["accelerator_config"].pop("use_configured_state", None)
    return {
        name: value
        for name, value in as_json(args.to_dict()).items()
        if not name.startswith(_INCIDENTAL)
        and name in defaults
        # Empty is how the arguments write None once they are made.
        and (value or None) != (as_json(getattr(defaults[name], "value", defaults[name])) or None)
    }


def sizes_of(**datasets: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Number of examples by part and task."""
    return {part: {task: len(data) for task, data in sorted(sets.items())} for part, sets in datasets.items()}


def as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def claim(path: Path, identity: Mapping[str, Any]) -> None:
    """Write an identity into a folder that is about to be used, or check the one that is there.

    Raises:
        ValueError: naming what differs, when the folder belongs to another run.
    """
    wanted = as_json(identity)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*wanted, *stored} if wanted.get(name) != stored.get(name))
        if changed:
            raise ValueError(
                f"{path.parent} was made with other settings ({', '.join(map(str, _differences(stored, wanted)))}); "
                "restore them, delete that folder, or choose another output_dir."
            )
        return
    write_json(path, wanted)


def _differences(stored: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*stored, *wanted})
        return [
            line
            for name in names
            if stored.get(name) != wanted.get(name)
            for line in _differences(stored.get(name), wanted.get(name), f"{where}.{name}" if where else name)
        ]
    return [f"{where}: {stored!r} -> {wanted!r}"]


def require_one_process(what: str) -> None:
    """Refuse a launcher's several processes.

    Raises:
        ValueError: naming what runs on one process only.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{what} runs on one process; start it without a launcher.")
