"""A merged adapter: what it holds, how it is saved, and how its dense part is folded into a base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..tensors import accumulation_dtype, listed
from ..tying import alias_of
from .folder import write_folder
from .modules import PREFIX, Layout
from .outputs import Deltas


Base = TypeVar("Base", bound=nn.Module | Mapping[str, Tensor])


@dataclass(frozen=True)
class AdapterMerge:
    """
    The result of [`merge_adapters`].

    Args:
        config (`LoraConfig` or `None`):
            Configuration of the merged adapter; `None` with `output="delta"`.
        factors (`dict[str, Tensor]`):
            Its LoRA factors under PEFT's names.
        deltas (`Mapping[str, Tensor]`):
            Dense updates by weight name of the base model, multiplied out when read: the whole update with
            `output="delta"`, what the adapter lacks with `output="residual"`, otherwise empty.
        saved (`dict[str, Tensor]`):
            Other tensors of the merged adapter (`modules_to_save`, biases), by name in the base model.
        heads (`dict[str, dict[str, Tensor]]`):
            Tensors kept per task, by task.
        head_configs (`dict[str, LoraConfig]`):
            Configuration of the merged adapter with the head of a task.
        report (`dict[str, Any]`):
            `"inputs"`, `"method"`, `"space"`, `"scaling_coefficient"` as it was applied, `"lost_energy"`: share of the
            squared norm that `output="svd"` cut off, and for each of `"modules"` its `"rank"` and `"lost_energy"`;
            `"saved"`: what became of each saved module.
    """

    config: Any
    factors: dict[str, Tensor]
    deltas: Mapping[str, Tensor]
    saved: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    head_configs: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def state_dict(self, task: str | None = None) -> dict[str, Tensor]:
        """
        Tensors of the adapter as PEFT stores them.

        Args:
            task (`str`, *optional*): a key of `heads`, whose head is added.

        Returns:
            `dict[str, Tensor]`: for `peft.set_peft_model_state_dict`.
        """
        saved = {**self.saved, **(self._head(task) if task is not None else {})}
        return {**self.factors, **{f"{PREFIX}{name}": tensor for name, tensor in saved.items()}}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Writes the result into a folder: beside it first, under its name when whole.

        `PeftModel.from_pretrained(base, folder)` loads the merged adapter, and
        `PeftModel.from_pretrained(base, folder + "/tasks/<task>")` the same with a task's own head. Dense updates go
        into `update.safetensors` (for [`~AdapterMerge.apply_to`]); `merge_config.json` says how all was made.

        Args:
            folder (`str`): must not exist, be empty, or hold an earlier result of this kind, which is replaced.

        Raises:
            ValueError: if the folder holds something else.
        """
        write_folder(self, folder)

    def apply_to(self, base: Base, task: str | None = None) -> Base:
        """
        Adds the dense updates to a base model: all of a `"delta"`; of a `"residual"`, what its adapter lacks.

        Saved modules of a `"delta"` replace the base's, since there is no adapter to carry them.

        Args:
            base (`nn.Module` or `Mapping[str, Tensor]`):
                Model, changed in place, or its state dict, which is left alone.
            task (`str`, *optional*):
                A key of `heads`: its head replaces the base's.

        Returns:
            `nn.Module` or `dict[str, Tensor]`: the model itself, or a new state dict that shares the unchanged tensors.

        Raises:
            ValueError: before anything is changed, if there is no dense update, or a weight is missing, tied, quantised
                or of another shape.
        """
        if not isinstance(self.deltas, Deltas):
            raise ValueError(
                "There is no dense update; load the saved adapter with PEFT, or merge with output='delta'."
            )
        replaced = {**(self.saved if self.config is None else {}), **(self._head(task) if task is not None else {})}
        result = dict(base.state_dict(keep_vars=True)) if isinstance(base, nn.Module) else dict(base)
        layouts = _checked_layouts(base, result, self.deltas.layouts)
        _check_replaced(result, replaced)
        with torch.no_grad():
            for name, layout in layouts.items():
                delta = layout.weight(self.deltas.layouts[name].matrix(self.deltas[name]))
                _put(base, result, name, _added(result[name], delta))
            for name, tensor in replaced.items():
                _put(base, result, name, tensor.to(result[name]))
        return base if isinstance(base, nn.Module) else result  # type: ignore[return-value]

    def _head(self, task: str) -> dict[str, Tensor]:
        if task not in self.heads:
            raise ValueError(f"There is no head of {task!r}; separate heads are kept of {listed(list(self.heads))}.")
        return self.heads[task]


def _checked_layouts(
    base: nn.Module | Mapping[str, Tensor], state: Mapping[str, Tensor], layouts: Mapping[str, Layout]
) -> dict[str, Layout]:
    """The layouts as they are in the base: whether a matrix lies transposed is seen there, not in the adapter."""
    users: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        users.setdefault(alias_of(tensor) or name, []).append(name)
    found = {}
    for name, layout in layouts.items():
        if name not in state:
            raise ValueError(f"The base has no {name!r}; pass a model of the class that the adapters were trained on.")
        weight = state[name]
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(f"{name!r} of the base is quantised ({weight.dtype}); load it in a floating type.")
        names = users[alias_of(weight) or name]
        if len(names) > 1:
            raise ValueError(
                f"{listed(names)} of the base are tied, and the update is for {name!r} alone; untie them, or merge with "
                "output='cat'."
            )
        if isinstance(base, nn.Module):
            found[name] = _layout_of_module(base.get_submodule(name.rpartition(".")[0]), layout)
        else:
            found[name] = _layout_of_shape(tuple(weight.shape), layout)
        if tuple(weight.shape) != found[name].weight_shape:
            raise ValueError(
                f"{name!r} has shape {tuple(weight.shape)} in the base, but its update {layout.weight_shape}; pass the "
                "base model of the adapters."
            )
    if not isinstance(base, nn.Module):
        _check_square(layouts, found)
    return found


def _layout_of_module(module: nn.Module, layout: Layout) -> Layout:
    if layout.embedding or len(layout.inner) > 1:
        return layout
    return _turned(layout, type(module).__name__ == "Conv1D")


def _layout_of_shape(shape: tuple[int, ...], layout: Layout) -> Layout:
    other = _turned(layout, not layout.transposed)
    return other if not layout.embedding and shape == other.weight_shape != layout.weight_shape else layout


def _turned(layout: Layout, transposed: bool) -> Layout:
    return Layout(layout.out, layout.inner, layout.embedding, transposed)


def _check_square(layouts: Mapping[str, Layout], found: Mapping[str, Layout]) -> None:
    """Refuse to guess: where the adapter's flag is wrong for one matrix, it says nothing about square ones."""
    wrong = [name for name in found if found[name] != layouts[name]]
    square = [name for name, layout in found.items() if not layout.embedding and layout.shape[0] == layout.shape[1]]
    if wrong and square:
        raise ValueError(
            f"The adapter's fan_in_fan_out is wrong for {listed(wrong)}, so whether {listed(square)} lie transposed cannot "
            "be told from a state dict; pass the model itself."
        )


def _check_replaced(state: Mapping[str, Tensor], replaced: Mapping[str, Tensor]) -> None:
    for name, tensor in replaced.items():
        if name not in state or state[name].shape != tensor.shape:
            shape = tuple(state[name].shape) if name in state else "missing"
            raise ValueError(
                f"The saved tensor {name!r} has shape {tuple(tensor.shape)}, in the base it is {shape}; pass a base model "
                "with that head."
            )


def _added(weight: Tensor, delta: Tensor) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    return (weight.detach().to(dtype) + delta.to(weight.device, dtype)).to(weight.dtype)


def _put(base: Any, result: MutableMapping[str, Tensor], name: str, value: Tensor) -> None:
    if isinstance(base, nn.Module):
        result[name].data.copy_(value)
    else:
        result[name] = value
