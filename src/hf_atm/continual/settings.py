"""How a sequence of stages is run."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..merging import check_merge_kwargs
from .replay import replay_size


METHODS = ("atm", "opcm")


@dataclass(frozen=True)
class ContinualSettings:
    """Settings of continual ATM, beside the [`ATMConfig`] of its stages."""

    method: str = field(
        default="atm",
        metadata={
            "help": "'atm': each stage is a run of ATM on the new tasks and samples of the earlier ones; 'opcm': each new "
            "task is tuned alone from the start, and stored task vectors are merged without any data."
        },
    )
    replay: float = field(
        default=0.1,
        metadata={"help": "Examples kept of an earlier task: a number, or a fraction up to 1. 0 keeps none."},
    )
    ewc: float = field(
        default=0.0, metadata={"help": "Strength of elastic weight consolidation; 0 switches it off. At least 0."}
    )
    fisher_examples: int = field(
        default=64, metadata={"help": "Examples per task that measure its Fisher information. At least 1."}
    )
    compression: float | None = field(
        default=0.1, metadata={"help": "Share of a matrix's entries that stored task vectors keep; null keeps all."}
    )
    merge_kwargs: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Parameters of 'opcm', such as alpha."}
    )
    references: bool = field(
        default=False,
        metadata={"help": "Tune each later task alone from the start as well, to report forward transfer."},
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"continual.method is {self.method!r}; choose one of {', '.join(METHODS)}.")
        # Sizes are checked once the data are known.
        replay_size("", sys.maxsize, self.replay)
        if (
            isinstance(self.ewc, bool)
            or not isinstance(self.ewc, (int, float))
            or not (self.ewc >= 0 and math.isfinite(self.ewc))
        ):
            raise ValueError(f"continual.ewc is {self.ewc!r}; it must be a number from 0.")
        if not isinstance(self.references, bool):
            raise ValueError(f"continual.references is {self.references!r}; it must be true or false.")
        examples = self.fisher_examples
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise ValueError(f"continual.fisher_examples is {self.fisher_examples!r}; it must be at least 1.")
        ratio = self.compression
        if ratio is not None and not (isinstance(ratio, (int, float)) and 0 < ratio < 1):
            raise ValueError(f"continual.compression is {self.compression!r}; it must lie in (0, 1), or be null.")
        if self.method == "opcm" and self.ewc:
            raise ValueError(f"continual.ewc={self.ewc} is for method 'atm'; OPCM tunes every task from the start.")
        if not isinstance(self.merge_kwargs, Mapping):
            raise ValueError(f"continual.merge_kwargs is {self.merge_kwargs!r}; it must map parameters to values.")
        if self.merge_kwargs and self.method != "opcm":
            raise ValueError("continual.merge_kwargs are those of OPCM; for ATM use training.merge_kwargs.")
        check_merge_kwargs("opcm", self.merge_kwargs)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ContinualSettings:
        """From a mapping, as a YAML file has it.

        Raises:
            ValueError: for unknown keys and bad values.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"continual has the unknown key {key!r}; known: {', '.join(known)}.")
        # YAML takes 1e-3 for text.
        return cls(**{key: _number(value) if key in ("replay", "ewc") else value for key, value in values.items()})


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_stages(stages: Any, tasks: Sequence[str]) -> list[list[str]]:
    """Stages from a list of task names and lists of them.

    Args:
        stages: for each stage, the tasks that are new in it: a name or a list.
        tasks (`Sequence[str]`): all tasks; each must come exactly once.

    Raises:
        ValueError: naming what is missing, unknown or repeated.
    """
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise ValueError(f"schedule must be a list of stages, each one or more task names, not {stages!r}.")
    result = []
    for number, stage in enumerate(stages, start=1):
        names = [stage] if isinstance(stage, str) else stage or []
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"stage {number} of schedule must be a task's name or a list of names, not {stage!r}.")
        result.append(list(names))
    named = [task for stage in result for task in stage]
    missing, unknown = sorted(set(tasks) - set(named)), sorted(set(named) - set(tasks))
    repeated = sorted({task for task in named if named.count(task) > 1})
    problems = [
        f"{word} {', '.join(names)}"
        for word, names in (("leaves out", missing), ("has the unknown", unknown), ("repeats", repeated))
        if names
    ]
    if problems or not all(result):
        raise ValueError(
            f"schedule {' and '.join(problems) or 'has an empty stage'}; the tasks are {', '.join(tasks)}."
        )
    return result
