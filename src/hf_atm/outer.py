"""The step from one round's base to the next: task weights, clipping and the outer optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .merging import norm_scale


def task_weights(spec: str | Mapping[str, float], num_examples: Mapping[str, int]) -> dict[str, float]:
    """One weight per task, in the order of `num_examples`.

    Args:
        spec (`str` or `Mapping[str, float]`): `"uniform"` (all 1), `"num_examples"` (proportional to the tasks' sizes,
            with mean 1, as FedAvg has it), `"loss_gap"` (all 1 until [`loss_gap_weights`] knows better in a round), or
            the weights themselves.
        num_examples (`Mapping[str, int]`): training examples per task.

    Raises:
        KeyError: when a mapping names an unknown task or leaves one out.
        ValueError: when a weight is negative or not finite, or all are zero.
    """
    tasks = list(num_examples)
    if spec in ("uniform", "loss_gap"):
        return dict.fromkeys(tasks, 1.0)
    if spec == "num_examples":
        mean = sum(num_examples.values()) / len(tasks)
        return {task: size / mean for task, size in num_examples.items()}
    if isinstance(spec, str):
        raise ValueError(f"task_weights is {spec!r}; use 'uniform', 'num_examples', 'loss_gap' or {{task: weight}}.")
    check_weights(spec)
    missing, unknown = sorted(set(tasks) - set(spec)), sorted(set(spec) - set(tasks))
    if missing or unknown:
        raise KeyError(f"task_weights must name exactly the tasks {tasks}: missing {missing}, unknown {unknown}.")
    return {task: float(spec[task]) for task in tasks}


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that no average can be made of.

    Raises:
        ValueError: naming the task, when a weight is no finite number from 0, or when all are zero.
    """
    for task, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"task_weights[{task!r}] is {weight!r}; a weight is a number from 0, and a task of weight 0 takes no "
                "part in the merge."
            )
    if not any(weights.values()):
        raise ValueError(f"All task_weights are zero ({', '.join(weights)}); give at least one task a weight above 0.")


def loss_gap_weights(gaps: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """Weights of METIS (https://huggingface.co/papers/2606.16501): tasks that lost most by the last merge count most.

    `w = T * softmax(gap / temperature)`, with mean 1. Equal gaps, or a very high temperature, give equal weights.

    Args:
        gaps (`Mapping[str, float]`): per task, validation loss of the round's base minus that of its tuned model.
        temperature (`float`, *optional*, defaults to 1.0): above 0, in units of the loss.
    """
    largest = max(gaps.values())
    exponentials = {task: math.exp((gap - largest) / temperature) for task, gap in gaps.items()}
    total = math.fsum(exponentials.values())
    return {task: len(gaps) * value / total for task, value in exponentials.items()}


def clip_factors(norms: Mapping[str, float], limit: float | str | None) -> dict[str, float]:
    """The factor in (0, 1] that brings each task vector's L2 norm down to `limit`.

    Args:
        norms (`Mapping[str, float]`): L2 norm per task.
        limit (`float`, `"mean"` or `None`): a norm, the mean of `norms`, or no clipping.
    """
    if limit is None:
        return dict.fromkeys(norms, 1.0)
    bound = sum(norms.values()) / len(norms) if limit == "mean" else float(limit)
    return {task: min(1.0, bound / norm) if norm > 0 else 1.0 for task, norm in norms.items()}


class OuterOptimizer:
    """Adds the merged update to the base: plain, with momentum, or with Nesterov momentum.

    With merged update g, step size gamma and momentum mu: m <- mu m + g, and the base moves by gamma (g + mu m) with
    Nesterov, by gamma m without, by gamma g when mu is 0. This is `torch.optim.SGD` fed with -g (DiLoCo,
    https://huggingface.co/papers/2311.08105).

    Args:
        learning_rate (`float`, `"norm"` or `"search"`): gamma; `"norm"` restores the root-mean-square norm of the
            task vectors, and `"search"` starts from there.
        momentum (`float`, *optional*, defaults to 0.0): mu, in `[0, 1)`; costs one more copy of the shared weights.
        nesterov (`bool`, *optional*, defaults to `True`): look one step ahead.
    """

    def __init__(self, learning_rate: float | str = 1.0, momentum: float = 0.0, nesterov: bool = True) -> None:
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.nesterov = nesterov
        self.velocity: dict[str, Tensor] = {}

    def step_size(self, task_vector_norms: list[float], merged_norm: float) -> float:
        """gamma of this round, or where the search for it starts."""
        if isinstance(self.learning_rate, str):
            return norm_scale(task_vector_norms, merged_norm)
        return float(self.learning_rate)

    def step(self, merged: dict[str, Tensor], step_size: float) -> dict[str, Tensor]:
        """Turn the merged update into the base's move, in place.

        Args:
            merged (`dict[str, Tensor]`): fp32, by name; overwritten.
            step_size (`float`): gamma.

        Returns:
            `dict[str, Tensor]`: `merged`, now holding what is to be added to the base.
        """
        if self.momentum:
            for name, update in merged.items():
                if name in self.velocity:
                    self.velocity[name].mul_(self.momentum).add_(update)
                else:
                    self.velocity[name] = update.clone()
        return self.last_move(merged, step_size)

    def last_move(self, merged: dict[str, Tensor], step_size: float) -> dict[str, Tensor]:
        """The move that the momentum as it stands makes of `merged`, in place: `step` without stepping."""
        for name, update in merged.items():
            if self.momentum and self.nesterov:
                update.add_(self.velocity[name], alpha=self.momentum)
            elif self.momentum:
                update.copy_(self.velocity[name])
            if step_size != 1.0:
                update.mul_(step_size)
        return merged
