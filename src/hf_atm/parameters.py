"""Which parameters a merge shares between tasks, and which belong to one task."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .lora import LoraSpace
from .spaces import Space, WeightSpace


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_HEAD = re.compile(r"(?:^|\.)heads\.([^.]+)\.")


def base_model(model: nn.Module) -> Any:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class ParameterGroups:
    """Sorts a model's trainable parameters into shared and private ones.

    Private are the heads (`heads.<task>.`, when the model has a `heads` module dictionary) and what
    [`MultiTaskModel.add_task_specific_modules`] marked. They train in their own task's segments and are never merged.

    Args:
        model (`nn.Module`): the model, PEFT wrapper included.
        tasks (`Sequence[str]`): the run's tasks.
        merging (`bool`, *optional*, defaults to `True`): whether shared parameters are to be merged.

    Raises:
        ValueError: when nothing is shared though it is to be merged, or a trainable parameter is not float32.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], merging: bool = True) -> None:
        self.model = model
        inner = base_model(model)
        has_heads = isinstance(getattr(inner, "heads", None), nn.ModuleDict)
        # By identity: an adapter's wrapper gives parameters other names.
        names = set(inner.task_specific_parameter_names()) if has_task_specific(inner) else set()
        own_copies = {id(parameter) for name, parameter in inner.named_parameters() if name in names}
        self.shared: dict[str, nn.Parameter] = {}
        self.heads: dict[str, dict[str, nn.Parameter]] = {task: {} for task in tasks}
        self.copied: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"The trainable parameter {name!r} is {parameter.dtype}, in which small updates vanish; load the "
                    "model with dtype=torch.float32 and pass bf16=True for speed."
                )
            head = _HEAD.search(name) if has_heads else None
            if head is not None:
                self.heads.setdefault(head[1], {})[name] = parameter
            elif id(parameter) in own_copies:
                self.copied[name] = parameter
            else:
                self.shared[name] = parameter
        if merging and not self.shared:
            raise ValueError(
                "No trainable parameter is shared between the tasks, so there is nothing to merge; unfreeze the "
                "backbone, or pass peft_config."
            )

    def space(self, lora_merge_mode: str, device: str) -> Space:
        """How a merge sees the shared parameters."""
        if isinstance(self.model, PeftModel) and lora_merge_mode != "adapter":
            return LoraSpace(self.model, self.shared, lora_merge_mode, device)
        return WeightSpace(self.shared, device)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics of batch normalisation that tasks share, by buffer name."""
        inner = base_model(self.model)
        private = inner.task_specific_buffer_names() if has_task_specific(inner) else []
        return {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if name.rpartition(".")[2] in _STATISTICS and name not in private
        }

    def activate(self, task: str) -> None:
        """Make `task`'s own copies of modules the live ones."""
        inner = base_model(self.model)
        if has_task_specific(inner):
            inner.activate_task(task)

    def train_shared(self, wanted: bool) -> None:
        """Let shared parameters learn, or keep them out of the backward pass and from the optimizer."""
        for parameter in self.shared.values():
            parameter.requires_grad_(wanted)

    def has_private(self, task: str) -> bool:
        """Whether anything belongs to `task` alone and can learn."""
        return bool(self.heads.get(task) or self.copied)

    def private_sizes(self, tasks: Sequence[str]) -> dict[str, dict[str, int]]:
        """Parameters that each task has to itself: in its `head`, and in its copies of backbone `modules`."""
        copied = sum(parameter.numel() for parameter in self.copied.values())
        return {
            task: {
                "head": sum(parameter.numel() for parameter in self.heads.get(task, {}).values()),
                "modules": copied,
            }
            for task in tasks
        }

    def stored_copies(self) -> dict[str, Tensor]:
        """All tasks' copies of private modules, by buffer name, where the Trainer's own checkpoint lacks them."""
        inner = base_model(self.model)
        if inner is self.model or not has_task_specific(inner):
            return {}
        inner.sync_task_specific()
        return dict(inner.task_specific.named_buffers())

    @torch.no_grad()
    def load_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """Counterpart of `stored_copies`."""
        stored = self.stored_copies()
        for name, tensor in tensors.items():
            stored[name].copy_(tensor)
        if stored:
            base_model(self.model).forget_active_task()

    def own_state(self, task: str) -> dict[str, Tensor]:
        """All live tensors that are `task`'s alone, frozen ones and stored copies of modules among them, by state dict name."""
        state = base_model(self.model).state_dict()
        return {
            name: tensor
            for name, tensor in state.items()
            if name.startswith((f"heads.{task}.", f"task_specific.{task}."))
        }

    def head_values(self, task: str) -> dict[str, Tensor]:
        """Copies of a task's head, by parameter name."""
        return {name: parameter.detach().clone() for name, parameter in self.heads.get(task, {}).items()}

    def private_values(self, task: str) -> dict[str, Tensor]:
        """Copies of what only `task` trains, by name."""
        private = {**self.heads.get(task, {}), **self.copied}
        return {name: parameter.detach().clone() for name, parameter in private.items()}

    @torch.no_grad()
    def write_private(self, values: Mapping[str, Tensor]) -> None:
        """Counterpart of `private_values`."""
        private = {name: parameter for head in self.heads.values() for name, parameter in head.items()} | self.copied
        for name, value in values.items():
            private[name].copy_(value)

    def digest(self) -> str:
        """Changes with the model's class and the names and shapes of its parameters."""
        content = [type(base_model(self.model)).__name__]
        content += [f"{name}{tuple(parameter.shape)}" for name, parameter in sorted(self.shared.items())]
        content += [
            f"{name}{tuple(parameter.shape)}"
            for head in (*self.heads.values(), self.copied)
            for name, parameter in sorted(head.items())
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def has_task_specific(model: nn.Module) -> bool:
    """Whether the model can keep private copies of modules."""
    return hasattr(model, "task_specific_parameter_names")
