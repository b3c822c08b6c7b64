"""What an optimizer remembers from one segment to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class OptimizerMemory:
    """Applies an `optimizer_policy` at segment boundaries.

    Args:
        policy (`str`): `"reset"` forgets everything, `"keep"` nothing, `"per_task"` keeps every task's state apart,
            `"per_task_second_moment"` does so too but restarts the first moment, which points at weights that the
            merge has left. The last two hold one more optimizer state per task.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.states: dict[str, dict[Tensor, Any]] = {}

    def begin(self, optimizer: Any, task: str) -> None:
        """Give the optimizer what it is to know at the start of `task`'s segment."""
        if self.policy == "keep":
            return
        state = inner_optimizer(optimizer).state
        state.clear()
        state.update(self.states.get(task, {}))
        if self.policy == "per_task_second_moment":
            for slots in state.values():
                for name in _FIRST_MOMENTS:
                    if isinstance(slots.get(name), Tensor):
                        slots[name].zero_()

    def end(self, optimizer: Any, task: str) -> None:
        """Take from the optimizer what is to be kept at the end of `task`'s segment."""
        state = inner_optimizer(optimizer).state
        if self.policy.startswith("per_task"):
            self.states[task] = dict(state)
        if self.policy != "keep":
            state.clear()

    def tensors(self, names: Mapping[int, str], except_task: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold: the states of all tasks but the one in the optimizer right now.

        Args:
            names (`Mapping[int, str]`): parameter name by `id`.
            except_task (`str`, *optional*): task whose segment is under way; the Trainer saves its state.

        Returns:
            `tuple[dict, dict]`: tensors by dotted name, and the values that are no tensors, by task and parameter.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for task, state in self.states.items():
            if task == except_task:
                continue
            values[task] = {}
            for parameter, slots in state.items():
                name = names[id(parameter)]
                values[task][name] = {slot: value for slot, value in slots.items() if not isinstance(value, Tensor)}
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{task}.{name}.{slot}"] = value
        return tensors, values

    def load(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
        optimizer: Any,
    ) -> None:
        """Counterpart of `tensors`; `parameters` are the live ones by name."""
        on_device = {
            parameter
            for group in inner_optimizer(optimizer).param_groups
            if group.get("fused") or group.get("capturable")
            for parameter in group["params"]
        }
        self.states = {
            task: {parameters[name]: dict(slots) for name, slots in state.items()} for task, state in values.items()
        }
        for key, tensor in tensors.items():
            if not key.startswith("optimizer."):
                continue
            _, task, rest = key.split(".", 2)
            name, _, slot = rest.rpartition(".")
            parameter = parameters[name]
            # Unfused optimizers keep their step counters on the CPU.
            device = parameter.device if tensor.ndim or parameter in on_device else tensor.device
            self.states[task][parameter][slot] = tensor.to(device)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
