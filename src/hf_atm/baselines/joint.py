"""Joint multi-task training: the plan, data and trainer of ATM, without tuning apart and without merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from time import perf_counter
from typing import Any

import torch

from ..data import RoundDataset
from ..episodic import refresh_tasks
from ..learning_rate import schedule_curve
from ..loop import ATMLoop
from ..merge_report import DivergenceError
from ..schedule import Position, RoundPlan, Segment
from ..seeding import derive_seed
from ..trainer import ATMTrainer


@dataclass(frozen=True)
class JointPlan(RoundPlan):
    """One task per optimizer step, in an order drawn anew for each round.

    A round holds exactly `lengths` steps of each task, as a round of ATM does, so both have seen the same examples
    whenever a round ends.

    Args:
        seed (`int`, *optional*, defaults to 0): decides the order.
    """

    seed: int = 0

    @cached_property
    def _orders(self) -> Callable[[int], tuple[list[int], list[int]]]:
        steps = torch.repeat_interleave(torch.arange(len(self.tasks)), torch.tensor(self.lengths))

        def order(round_index: int) -> tuple[list[int], list[int]]:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "joint", round_index))
            tasks = steps[torch.randperm(len(steps), generator=generator)].tolist()
            counts, offsets = [0] * len(self.tasks), []
            for task in tasks:
                offsets.append(counts[task])
                counts[task] += 1
            return tasks, offsets

        return lru_cache(maxsize=2)(order)

    def locate(self, step: int) -> Position:
        """The step that follows `step` finished ones; `offset` counts the task's own steps within the round."""
        round_index, within = divmod(step, self.round_steps)
        tasks, offsets = self._orders(round_index)
        task = tasks[within]
        return Position(round_index, self.tasks[task], offsets[within], self.lengths[task])

    def closed_by(self, step: int) -> Segment | None:
        """There are no segments."""
        return None


def proportional_lengths(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` steps over tasks in proportion to their sizes, by largest remainders, at least one each.

    Args:
        sizes (`Mapping[str, int]`): training examples per task.
        total (`int`): optimizer steps of a round, at least one per task.
    """
    free = total - len(sizes)
    shares = {task: free * size / sum(sizes.values()) for task, size in sizes.items()}
    lengths = {task: 1 + int(share) for task, share in shares.items()}
    by_remainder = sorted(sizes, key=lambda task: (int(shares[task]) - shares[task], task))
    for task in by_remainder[: total - sum(lengths.values())]:
        lengths[task] += 1
    return lengths


class JointDataset(RoundDataset):
    """The examples of a round of ATM, one optimizer step's worth at a time, in a joint plan's order."""

    plan: JointPlan

    def _place(self, index: int) -> tuple[str, int]:
        step, within = divmod(index, self.global_batch)
        position = self.plan.locate(self.round * self.plan.round_steps + step)
        return position.task, position.offset * self.global_batch + within


class JointLoop(ATMLoop):
    """What is left of the loop when all tasks train the same weights: the plan, its record of rounds, checkpoints."""

    merging = False

    def _lay_out(self, lengths: dict[str, int]) -> tuple[RoundPlan, RoundDataset]:
        if self.trainer.proportional:
            lengths = proportional_lengths(self.num_examples, sum(lengths.values()))
        plan = JointPlan(tuple(lengths), tuple(lengths.values()), self.args.num_rounds, seed=self.data_seed)
        return plan, JointDataset(self.datasets, plan, self.global_batch, self.data_seed, self.shuffle)

    def rates(self) -> Callable[[int], float]:
        """One schedule over the whole run, whatever `lr_schedule_scope` says: there are no segments to restart at."""
        return schedule_curve(self.args, self.plan.total_steps)

    def fingerprint(self) -> dict[str, Any]:
        """That of a run of ATM, marked as joint."""
        return {**super().fingerprint(), "merge_method": "joint", "proportional": self.trainer.proportional}

    def begin_training(self, state: Any) -> None:
        """Start anew, or load the report of an interrupted run."""
        self._set_up()
        self._reset_progress()
        self.records = []
        if self.resume_from is not None:
            self._load(state)
        else:
            refresh_tasks(self.trainer)
        self.resume_from = None
        self.running = True
        self._clock, self._evaluating_before = perf_counter(), self.seconds["evaluating"]

    def begin_step(self, state: Any, control: Any) -> Any:
        """Nothing but the task's own modules changes between steps."""
        self.groups.activate(self.plan.locate(state.global_step).task)
        return control

    def end_step(self, state: Any, control: Any) -> Any:
        """Make a round's record."""
        if self.plan.is_round_end(state.global_step):
            now, evaluating = perf_counter(), self.seconds["evaluating"]
            self.seconds["tuning"] += now - self._clock - (evaluating - self._evaluating_before)
            position = self.plan.locate(state.global_step - 1)
            self.records.append(
                {
                    "round": position.round,
                    "tasks": list(self.plan.tasks),
                    "method": "joint",
                    "global_step": state.global_step,
                    "metrics": None,
                    "scores": {},
                    "metric_names": {},
                    "seconds": dict(self.seconds),
                }
            )
            self.seconds = dict.fromkeys(self.seconds, 0.0)
            self._clock, self._evaluating_before = now, 0.0
        return control

    def end_training(self, state: Any) -> None:
        """Write the report."""
        self.running = False
        refresh_tasks(self.trainer)
        if state.is_world_process_zero:
            self.write_report()

    def attach_metrics(self, state: Any, metrics: Mapping[str, float]) -> bool:
        """As in a run of ATM; an evaluation is no part of the next round's training."""
        attached = super().attach_metrics(state, metrics)
        if attached:
            self._clock = perf_counter()
        return attached

    def describe(self, logs: dict[str, float], step: int) -> None:
        """Add the round to a training log, whose loss is over all tasks."""
        logs["round"] = self.plan.locate(step - 1).round

    def interrupt(self) -> None:
        """There is no base to go back to."""
        self.running = False
        self.trainer.is_in_train = False

    def _undo(self, error: DivergenceError) -> DivergenceError:
        return DivergenceError(f"{error} Joint training has no base to return to.")

    def _mid_round(self, step: int) -> bool:
        return False


class JointTrainer(ATMTrainer):
    """Joint multi-task training at the same number of optimizer steps as ATM, the baseline it has to be held against.

    Takes what [`ATMTrainer`] takes, data, heads, collators, metrics and adapters included. Each optimizer step holds
    one task's batch; one optimizer and one learning rate schedule run through all of them. `num_rounds` is the number
    of evaluations and checkpoints; settings of merging have no effect.

    Args:
        args, kwargs: as for [`ATMTrainer`].
        proportional (`bool`, *optional*, defaults to `False`): share out the steps in proportion to the tasks' sizes,
            rather than as ATM would.
    """

    loop_class = JointLoop

    def __init__(self, *args: Any, proportional: bool = False, **kwargs: Any) -> None:
        self.proportional = proportional
        super().__init__(*args, **kwargs)
        if self.args.task_specific_modules:
            raise ValueError(
                "task_specific_modules needs one optimizer memory per task, which joint training has not; leave it out."
            )
        # A round's table compares experts and the merged model, and here there are none.
        self.args.round_table = False
