"""Alignment inside the loop: before each merge, every task's model in the order of units of the round's base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .parameters import ParameterGroups, has_task_specific
from .rounds import RoundState


class Realignment:
    """
    Brings the task models of a round into one order of units, that of the base, before they are merged.

    Task models and base are aligned together by C2M3 (https://huggingface.co/papers/2405.17897). A task whose units have
    changed places gets its vector, its statistics, its head and its own modules reordered; its function stays. Models that
    were tuned from one base have nothing to reorder, and the merge is then what it was.

    Args:
        model (`nn.Module`): the model, of a family with a permutation specification.
        groups (`ParameterGroups`): what its tasks share.
        seed (`int`, *optional*, defaults to 0): of random starts.

    Raises:
        KeyError: for a family without specification.
        ValueError: for an adapter, a model that does not tell its family, or frozen weights whose order would have to
            follow.
    """

    def __init__(self, model: nn.Module, groups: ParameterGroups, seed: int = 0) -> None:
        # Alignment is seldom wanted, and its imports are not free.
        from .alignment import spec_for
        from .alignment.inputs import check_models

        if isinstance(model, PeftModel):
            raise ValueError(
                "align_every_round=True reorders whole weights, and adapters of one base share its order of units; leave it "
                "off, or train without an adapter."
            )
        if not isinstance(getattr(getattr(model, "config", None), "model_type", None), str):
            raise ValueError(
                f"align_every_round=True needs to know how units are connected, and a {type(model).__name__} has no "
                "config.model_type; give it one that register_permutation_spec knows, or leave it off."
            )
        self.model, self.groups, self.seed = model, groups, seed
        self.spec = spec_for(model)
        self._before: dict[str, Tensor] = {}
        self._refuse_frozen()
        shared = {**groups.shared, **groups.statistics()}
        check_models([shared, *({**shared, **groups.own_state(task)} for task in groups.heads)], self.spec)

    def _refuse_frozen(self) -> None:
        own = self.model.task_specific_buffer_names() if has_task_specific(self.model) else []  # type: ignore[operator]
        live = dict(self.model.named_buffers())
        tensors = [*self.groups.shared.values(), *self.groups.copied.values(), *self.groups.statistics().values()]
        movable = {tensor.data_ptr() for tensor in [*tensors, *(live[name] for name in own)]}
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() in movable or self.spec.is_head(name) or not tensor.is_floating_point():
                continue
            if any(axis is not None for axis in self.spec.axes_of(name, tensor.ndim)):
                raise ValueError(
                    f"align_every_round=True may have to reorder {name!r}, which is frozen and the same for all tasks; let "
                    "it train, or leave align_every_round off."
                )

    def apply(self, rounds: RoundState) -> dict[str, int]:
        """
        Aligns the captured task models of a round with its base, and the tasks' own tensors in the live model with them.

        Args:
            rounds ([`RoundState`]): the round, all of its tasks captured.

        Returns:
            `dict[str, int]`: by task, the number of units that changed places.
        """
        from .alignment import align

        own = {task: self.groups.own_state(task) for task in rounds.tasks}
        states = [
            {**rounds.tuned(task), **rounds.task_statistics.get(task, {}), **_beside(own[task], rounds.base)}
            for task in rounds.tasks
        ]
        found = align([*states, {**rounds.base, **rounds.base_statistics}], self.spec, seed=self.seed)
        moved = {}
        self._before = {}
        for place, task in enumerate(rounds.tasks):
            order = found.map(place, len(states))
            moved[task] = order.moved
            if order.is_identity:
                continue
            rounds.reorder(task, order.apply)
            self._before |= {name: tensor.clone() for name, tensor in own[task].items()}
            self._write(order.apply(own[task]))
        return moved

    def undo(self) -> None:
        """Gives the tasks' own tensors the order that they had before [`apply`]."""
        self._write(self._before)
        self._before = {}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        live: dict[str, Any] = self.model.state_dict()
        for name, value in values.items():
            live[name].copy_(value)
        if values and has_task_specific(self.model):
            # Stored copies are the ones that changed.
            self.model.forget_active_task()  # type: ignore[operator]


def _beside(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, on the device of the others."""
    device = next(iter(others.values())).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}
