"""Commands of the arms: each is a whole process, `COMMAND RECIPE.yaml OUT`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from environments import NotInstalled, environment_python, versions


HERE = Path(__file__).resolve().parent
# Which peer's environment an arm runs in; the others run in this one.
_PEER = {"mergekit": "mergekit", "mergekit-bf16": "mergekit", "fusion_bench": "fusion_bench", "peft": "peft"}


class Commands:
    """Commands by arm, and why some are missing.

    Args:
        arms (`Iterable[str]`): arms wanted.
        environments (`Path`): where the peers are or get installed.
    """

    def __init__(self, arms: Iterable[str], environments: Path):
        self.commands: dict[str, list[str]] = {}
        self.missing: dict[str, str] = {}
        self.versions = {"ours": versions(Path(sys.executable))}
        for arm in arms:
            peer = _PEER.get(arm)
            try:
                python = environment_python(peer, environments) if peer else Path(sys.executable)
            except NotInstalled as error:
                self.missing[arm] = str(error)
                continue
            self.commands[arm] = _command(arm, python)
            if peer:
                self.versions[peer] = versions(python)


def _command(arm: str, python: Path) -> list[str]:
    if arm == "ours":
        return [str(python.with_name("hf-atm")), "merge"]
    if arm.startswith("mergekit"):
        return [str(python.with_name("mergekit-yaml"))]
    script = {"floor": "floor", "fusion_bench": "fusion_bench_driver", "peft": "peft_driver"}.get(arm, "plain_svd")
    return [str(python), str(HERE / f"{script}.py")]
