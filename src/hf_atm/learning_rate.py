"""Learning rates of the loop: one multiplier for every optimizer step of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import get_scheduler

from .moments import inner_optimizer
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
    lengths = plan.task_steps.values() if over_run else (length for _, length, _ in plan.segments)
    for length in sorted(set(lengths)):
        steps = length * plan.num_rounds if over_run else length
        curves[length] = schedule_curve(args, steps)

    def multiplier(step: int) -> float:
        step = min(step, plan.total_steps - 1)
        position = plan.locate(step)
        if over_run:
            return curves[plan.task_steps[position.task]](plan.own_step(step))
        return curves[position.length](position.offset)

    return multiplier


def schedule_curve(args: Any, steps: int) -> Callable[[int], float]:
    """The multiplier of `lr_scheduler_type` over `steps` optimizer steps.

    Args:
        args (`TrainingArguments`): schedule type, its keywords and warm-up.
        steps (`int`): length of the schedule.
    """
    # transformers builds schedulers, not curves; some of them read the optimizer's own rate.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0]


def set_head_rates(optimizer: Any, heads: Iterable[torch.Tensor], ratio: float) -> None:
    """Give heads parameter groups of their own, with `ratio` times the rate; to be done before a scheduler is made.

    Args:
        optimizer: a torch optimizer, or Accelerate's wrapper of one.
        heads (`Iterable[torch.Tensor]`): parameters of all heads.
        ratio (`float`): above 0.
    """
    inner, wanted = inner_optimizer(optimizer), {id(parameter) for parameter in heads}
    for group in list(inner.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            inner.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
    inner.param_groups[:] = [group for group in inner.param_groups if group["params"]]
