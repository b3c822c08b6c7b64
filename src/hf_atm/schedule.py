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
        settling: whether only what belongs to the task alone is trained, after the merge.
    """

    round: int
    task: str
    offset: int
    length: int
    settling: bool = False


class Segment(NamedTuple):
    """One task's contiguous optimizer steps in one round.

    Attributes:
        round: 0-based round.
        task: task tuned.
        start: global step before the segment's first step.
        length: optimizer steps.
        settling: as in [`Position`].
    """

    round: int
    task: str
    start: int
    length: int
    settling: bool = False


@dataclass(frozen=True)
class RoundPlan:
    """Rounds, tasks and steps of one run.

    A round is one segment of optimizer steps per task, in the order of `tasks`, followed by one merge and, with
    `head_steps`, by one settling segment per task, in which only its head and other private modules are trained.

    Args:
        tasks (`tuple[str, ...]`): task names in the order in which they are tuned.
        lengths (`tuple[int, ...]`): optimizer steps per task and round before the merge, each at least 1.
        num_rounds (`int`): rounds, at least 1.
        head_steps (`tuple[int, ...]`, *optional*): optimizer steps per task and round after the merge; none by default.

    Raises:
        ValueError: when there is no task, a name occurs twice, or a length or the number of rounds is below 1.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_rounds: int
    head_steps: tuple[int, ...] = ()

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
    def segments(self) -> tuple[tuple[str, int, bool], ...]:
        """Task, optimizer steps and whether it settles, for each segment of a round in turn."""
        tuning = tuple((task, length, False) for task, length in zip(self.tasks, self.lengths, strict=True))
        settling = ((task, steps, True) for task, steps in zip(self.tasks, self.head_steps, strict=True) if steps)
        return tuning + tuple(settling if self.settles else ())

    @property
    def settles(self) -> bool:
        """Whether any task takes head steps."""
        return any(self.head_steps)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Offset within a round at which each segment starts."""
        return (0, *accumulate(length for _, length, _ in self.segments[:-1]))

    @cached_property
    def task_steps(self) -> dict[str, int]:
        """Optimizer steps of each task in one round."""
        after = self.head_steps or (0,) * len(self.tasks)
        return {task: length + steps for task, length, steps in zip(self.tasks, self.lengths, after, strict=True)}

    @cached_property
    def tuning_steps(self) -> dict[str, int]:
        """Those of them before the merge."""
        return dict(zip(self.tasks, self.lengths, strict=True))

    @property
    def round_steps(self) -> int:
        """Optimizer steps of one round."""
        return sum(self.task_steps.values())

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.round_steps * self.num_rounds

    def locate(self, step: int) -> Position:
        """The step that follows `step` finished ones; after the last step of a run, the first of a next round."""
        round_index, within = divmod(step, self.round_steps)
        index = bisect_right(self.starts, within) - 1
        task, length, settling = self.segments[index]
        return Position(round_index, task, within - self.starts[index], length, settling)

    def own_step(self, step: int) -> int:
        """How many steps of its own the task of the next step has behind it in the whole run."""
        position = self.locate(step)
        before = self.tuning_steps[position.task] if position.settling else 0
        return position.round * self.task_steps[position.task] + before + position.offset

    def closed_by(self, step: int) -> Segment | None:
        """The segment whose last step was the `step`-th (1-based), or `None` inside a segment."""
        if step < 1:
            return None
        position = self.locate(step - 1)
        if position.offset + 1 < position.length:
            return None
        return Segment(position.round, position.task, step - position.length, position.length, position.settling)

    def is_merge(self, step: int) -> bool:
        """Whether the `step`-th step (1-based) is the last before a merge."""
        return step % self.round_steps == sum(self.lengths) % self.round_steps

    def is_round_end(self, step: int) -> bool:
        """Whether `step` finished steps are a whole number of rounds (0 counts: nothing is half done)."""
        return step % self.round_steps == 0

    def fingerprint(self) -> str:
        """A short digest that changes whenever tasks, their order, lengths or the number of rounds do."""
        content = json.dumps([self.tasks, self.lengths, self.num_rounds, self.head_steps])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
