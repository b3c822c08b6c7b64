"""Where every optimizer step of a run belongs: a pure function of the global step, without torch."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


class Position(NamedTuple):
    """The place of the optimizer step that comes next.

    Attributes:
        round: 0-based round.
        task: task tuned by that step.
        offset: optimizer steps of the task's segment already done, in `[0, length)`.
        length: optimizer steps of the segment.
    """

    round: int
    task: str
    offset: int
    length: int


class Segment(NamedTuple):
    """One task's contiguous optimizer steps in one round.

    Attributes:
        round: 0-based round.
        task: task tuned.
        start: global step before the segment's first step.
        length: optimizer steps.
    """

    round: int
    task: str
    start: int
    length: int


@dataclass(frozen=True)
class RoundPlan:
    """Rounds, tasks and steps of one run.

    A round is one segment of optimizer steps per task, in the order of `tasks`, followed by one merge.

    Args:
        tasks (`tuple[str, ...]`): task names in the order in which they are tuned.
        lengths (`tuple[int, ...]`): optimizer steps per task and round, each at least 1.
        num_rounds (`int`): rounds, at least 1.

    Raises:
        ValueError: when there is no task, a name occurs twice, or a length or the number of rounds is below 1.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_rounds: int

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("A round needs at least one task: pass `train_dataset={task: dataset, ...}`.")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"Task names must differ, got {list(self.tasks)}.")
        if len(self.lengths) != len(self.tasks):
            raise ValueError(f"{len(self.tasks)} tasks but {len(self.lengths)} segment lengths.")
        for task, length in zip(self.tasks, self.lengths, strict=True):
            if length < 1:
                raise ValueError(f"Task {task!r} has a segment of {length} optimizer steps; at least 1 is needed.")
        if self.num_rounds < 1:
            raise ValueError(f"num_rounds is {self.num_rounds}; at least 1 is needed.")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Offset within a round at which each segment starts."""
        return (0, *accumulate(self.lengths[:-1]))

    @property
    def round_steps(self) -> int:
        """Optimizer steps of one round."""
        return self.starts[-1] + self.lengths[-1]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.round_steps * self.num_rounds

    def locate(self, step: int) -> Position:
        """The step that follows `step` finished ones; after the last step of a run, the first of a next round."""
        round_index, within = divmod(step, self.round_steps)
        index = bisect_right(self.starts, within) - 1
        return Position(round_index, self.tasks[index], within - self.starts[index], self.lengths[index])

    def closed_by(self, step: int) -> Segment | None:
        """The segment whose last step was the `step`-th (1-based), or `None` inside a segment."""
        if step < 1:
            return None
        position = self.locate(step - 1)
        if position.offset + 1 < position.length:
            return None
        return Segment(position.round, position.task, step - position.length, position.length)

    def is_round_end(self, step: int) -> bool:
        """Whether `step` finished steps are a whole number of rounds (0 counts: nothing is half done)."""
        return step % self.round_steps == 0

    def fingerprint(self) -> str:
        """A short digest that changes whenever tasks, their order, lengths or the number of rounds do."""
        content = json.dumps([self.tasks, self.lengths, self.num_rounds])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
