"""Backbone parameters that every task keeps for itself."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class TaskSpecificMixin(PreTrainedModel):
    """Backbone parameters that every task keeps for itself.

    The live parameter objects stay where they are; each task's values rest in buffers under
    `task_specific.<task>.` (dots of the parameter name written `/`), and [`activate_task`] swaps them in place. The
    copies are part of the state dict, so one safetensors file holds them all.
    """

    config: Any
    backbone: PreTrainedModel
    heads: nn.ModuleDict
    task_specific: nn.ModuleDict
    _active_task: str | None = None

    def _live(self) -> dict[str, torch.Tensor]:
        """Live private tensors by their name in the plain backbone."""
        tensors = {_plain(name): tensor for name, tensor in _named_tensors(self.backbone)}
        return {name: tensors[name] for name in self._private_names}

    def _add_copies(self, tasks: Iterable[str]) -> None:
        live = self._live()
        for task in tasks:
            if task not in self.task_specific:
                self.task_specific[task] = nn.Module()
            copies = self.task_specific[task]
            for name, tensor in live.items():
                if _encode(name) not in copies._buffers:
                    copies.register_buffer(_encode(name), tensor.detach().clone())
        # Ranks hold equal copies already; DDP would otherwise broadcast all of them in every forward pass.
        self._ddp_params_and_buffers_to_ignore = [f"task_specific.{n}" for n, _ in self.task_specific.named_buffers()]

    def _init_task_specific(self) -> None:
        self.task_specific = nn.ModuleDict()
        self._private_names: list[str] = []
        if self.config.task_specific_modules:
            self._private_names = match_names(self.backbone, self.config.task_specific_modules)
            self._add_copies(self.heads)
        self.register_load_state_dict_pre_hook(_store_active_task)
        self.register_load_state_dict_post_hook(_forget_active_task)

    def add_task_specific_modules(self, patterns: list[str]) -> None:
        """Makes the backbone parameters that match private: every task gets its own copy of the present values.

        A batch norm's running statistics go with its parameters, though only parameters are listed by
        [`task_specific_parameter_names`].

        Args:
            patterns (`list[str]`): Shell-style patterns or parts of the backbone's parameter names.

        Raises:
            ValueError: If a pattern matches no parameter.
        """
        added = [name for name in match_names(self.backbone, patterns) if name not in self._private_names]
        self.sync_task_specific()
        self._private_names = self._private_names + added
        known = self.config.task_specific_modules
        self.config.task_specific_modules = [*known, *(pattern for pattern in patterns if pattern not in known)]
        self._add_copies(self.heads)

    def task_specific_parameter_names(self) -> list[str]:
        """Names, as in `named_parameters()`, of live parameters that hold the active task's private values."""
        wanted = set(self._private_names)
        names = [name for name, _ in self.backbone.named_parameters()]
        return [f"backbone.{name}" for name in names if _plain(name) in wanted]

    def task_specific_buffer_names(self) -> list[str]:
        """Names, as in `named_buffers()`, of live running statistics that hold the active task's private values."""
        wanted = set(self._private_names)
        return [f"backbone.{name}" for name, _ in self.backbone.named_buffers() if _plain(name) in wanted]

    @property
    def active_task(self) -> str | None:
        """The task whose private values are live, if any."""
        return self._active_task

    @torch.no_grad()
    def sync_task_specific(self) -> None:
        """Stores the live private values as those of the active task."""
        if self._active_task is None or not self._private_names:
            return
        copies = self.task_specific[self._active_task]
        for name, tensor in self._live().items():
            copies.get_buffer(_encode(name)).copy_(tensor)

    def forget_active_task(self) -> None:
        """Says that the stored copies have changed: the next task to become active is copied in, whatever is live."""
        self._active_task = None

    @torch.no_grad()
    def activate_task(self, task: str) -> None:
        """Makes `task`'s private values the live ones, after storing those of the task active before.

        Values are copied into the same parameter objects, so call it between backward passes. Nothing happens if the
        task is active already or the model has no private modules.

        Raises:
            KeyError: If the task is unknown.
        """
        if not self._private_names or task == self._active_task:
            return
        if task not in self.task_specific:
            raise KeyError(f"unknown task {task!r}; the model knows {', '.join(self.task_specific)}")
        self.sync_task_specific()
        copies = self.task_specific[task]
        for name, tensor in self._live().items():
            tensor.copy_(copies.get_buffer(_encode(name)))
        self._active_task = task

    def backbone_state_dict(self, task: str | None = None) -> dict[str, torch.Tensor]:
        """The backbone's state dict, with `task`'s private values in place of the live ones."""
        self.sync_task_specific()
        if task is None or not self._private_names:
            return dict(self.backbone.state_dict())
        # By identity, not by name: a tied tensor has one private copy and several keys.
        own = {id(tensor): self.task_specific[task]._buffers[_encode(name)] for name, tensor in self._live().items()}
        live = self.backbone.state_dict(keep_vars=True)
        return {key: own.get(id(tensor), tensor).detach() for key, tensor in live.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.sync_task_specific()
        return super().state_dict(*args, **kwargs)


def _store_active_task(module: TaskSpecificMixin, *_: Any) -> None:
    # A partial load (adapters only) leaves the copies alone, and they must not be older than the live values.
    module.sync_task_specific()


def _forget_active_task(module: TaskSpecificMixin, incompatible_keys: Any) -> None:
    # What was loaded is in the copies; the live values may be of any task. The next forward copies them in.
    module.forget_active_task()


def _encode(name: str) -> str:
    return name.replace(".", "/")


def _plain(name: str) -> str:
    # LoRA moves a weight it adapts into a `base_layer`.
    return name.replace(".base_layer.", ".")


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def match_names(backbone: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of `backbone`'s parameters that match, and of saved buffers beside them; errors if a pattern has none."""
    parameters = [_plain(name) for name, _ in backbone.named_parameters() if ".lora_" not in name]
    matched: set[str] = set()
    for pattern in patterns:
        bare = pattern.removeprefix("backbone.")
        found = {name for name in parameters if bare in name or fnmatch.fnmatchcase(name, bare)}
        if not found:
            raise ValueError(
                f"task_specific_modules pattern {pattern!r} matches no parameter of the backbone; its names are like "
                f"{parameters[0]!r} and {parameters[-1]!r}"
            )
        matched |= found
    owners = {name.rpartition(".")[0] for name in matched}
    saved = {_plain(name) for name in backbone.state_dict()}
    names = [_plain(name) for name, _ in backbone.named_buffers()]
    buffers = [name for name in names if name in saved and name.rpartition(".")[0] in owners]
    return [name for name in parameters if name in matched] + buffers
