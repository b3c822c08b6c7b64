"""What an optimizer remembers from one segment to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


# In a checkpoint, beside the tasks; no task's name holds a slash.
_COMMON, _SUMMED = "/common", "/summed"

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class OptimizerMemory:
    """Applies an `optimizer_policy` at segment boundaries.

    Args:
        policy (`str`): `"reset"` forgets everything, `"keep"` nothing, `"per_task"` keeps every task's state apart,
            `"per_task_second_moment"` does so too but restarts the first moment, which points at weights that the
            merge has left. These two hold one more optimizer state per task. `"shared"` averages the tasks' states of
            shared parameters at every merge, and all tasks start from the average: two more states, whatever the number
            of tasks.
        shared (`Iterable[Tensor]`, *optional*): the parameters that all tasks tune.
    """

    def __init__(self, policy: str, shared: Iterable[Tensor] = ()) -> None:
        self.policy = policy
        self.shared = set(shared)
        self.states: dict[str, dict[Tensor, Any]] = {}
        # Under "shared": the state that tasks start from, and the sum of those of the tasks tuned since.
        self.common: dict[Tensor, dict[str, Any]] = {}
        self.summed: dict[Tensor, dict[str, Any]] = {}

    def begin(self, optimizer: Any, task: str) -> None:
        """Give the optimizer what it is to know at the start of `task`'s segment."""
        if self.policy == "keep":
            return
        state = inner_optimizer(optimizer).state
        state.clear()
        state.update({parameter: _copied(slots) for parameter, slots in self.common.items()})
        state.update(self.states.get(task, {}))
        if self.policy == "per_task_second_moment":
            for slots in state.values():
                for name in _FIRST_MOMENTS:
                    if isinstance(slots.get(name), Tensor):
                        slots[name].zero_()

    def end(self, optimizer: Any, task: str, settling: bool = False) -> None:
        """Take from the optimizer what is to be kept at the end of `task`'s segment, or of its head's settling."""
        state = inner_optimizer(optimizer).state
        if self.policy == "shared":
            self.states[task] = {
                parameter: slots for parameter, slots in state.items() if parameter not in self.shared
            }
            if not settling:
                for parameter in self.shared.intersection(state):
                    _add(self.summed.setdefault(parameter, {}), state[parameter])
        if self.policy.startswith("per_task"):
            self.states[task] = dict(state)
        if self.policy != "keep":
            state.clear()

    def merge(self) -> None:
        """Make the common state of what the tasks' segments since the last merge have left."""
        for parameter, slots in self.summed.items():
            count = slots.pop("tasks")
            self.common[parameter] = {
                name: value / count if isinstance(value, Tensor) else value for name, value in slots.items()
            }
        self.summed = {}

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
        for task, state in {**self.states, _COMMON: self.common, _SUMMED: self.summed}.items():
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
        states = {
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
            states[task][parameter][slot] = tensor.to(device)
        self.common, self.summed = states.pop(_COMMON, {}), states.pop(_SUMMED, {})
        self.states = states


def _copied(slots: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in slots.items()}


def _add(total: dict[str, Any], slots: Mapping[str, Any]) -> None:
    """Add one task's state of a parameter to a sum of states; numbers and the like are those of the last one."""
    total["tasks"] = total.get("tasks", 0) + 1
    for name, value in slots.items():
        if isinstance(value, Tensor):
            total[name] = value.clone() if name not in total else total[name].add_(value)
        else:
            total[name] = value


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
