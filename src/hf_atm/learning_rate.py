"""Learning rates of the loop: one multiplier for every optimizer step of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from .schedule import RoundPlan


def learning_rate_multiplier(plan: RoundPlan, args: Any) -> Callable[[int], float]:
    """The factor on the learning rate at each global step, for [`~torch.optim.lr_scheduler.LambdaLR`].

    With `lr_schedule_scope="segment"` every segment runs through the whole schedule; with `"run"` each task runs
    through it once over all rounds, counting its own steps only, so that the order of tasks changes no rate.

    Args:
        plan (`RoundPlan`): the run's plan.
        args (`TrainingArguments`): schedule type, warm-up and scope.

    Returns:
        `Callable[[int], float]`: a plain function, which a scheduler's checkpoint leaves out.
    """
    over_run = args.lr_schedule_scope == "run"
    curves: dict[int, Callable[[int], float]] = {}
    for length in sorted(set(plan.lengths)):
        steps = length * plan.num_rounds if over_run else length
        # transformers builds schedulers, not curves; some of them read the optimizer's own rate.
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        curves[length] = scheduler.lr_lambdas[0]

    def multiplier(step: int) -> float:
        position = plan.locate(min(step, plan.total_steps - 1))
        elapsed = position.round * position.length if over_run else 0
        return curves[position.length](elapsed + position.offset)

    return multiplier
