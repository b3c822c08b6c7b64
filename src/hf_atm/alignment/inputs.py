"""The models to be aligned, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..merging.buffers import is_statistic
from ..merging.plan import QUANTISED, matches
from ..merging.tensors import all_finite, listed
from ..merging.tying import complete_ties, tied_groups
from .spec import PermutationSpec


def read_models(models: Any) -> list[dict[str, Any]]:
    """
    State dicts of at least two models, tied names completed.

    Raises:
        `ValueError`: for fewer than two models, or modules of different families.
    """
    if isinstance(models, (Mapping, nn.Module)):
        raise ValueError("models is one model; give a list of at least two state dicts or modules.")
    models = list(models)
    if len(models) < 2:
        raise ValueError(f"Got {len(models)} models; alignment needs at least two.")
    types = [getattr(getattr(model, "config", None), "model_type", None) for model in models]
    if len({kind for kind in types if kind}) > 1:
        raise ValueError(
            f"The models are of different types ({', '.join(map(str, types))}); align models of one family."
        )
    states = [dict(model.state_dict() if isinstance(model, nn.Module) else model) for model in models]
    complete_ties(states)
    return states


def with_heads(
    spec: PermutationSpec, heads: Sequence[str] | None, states: Sequence[Mapping[str, Any]]
) -> PermutationSpec:
    """
    The specification with the heads that the user names, if any.

    Raises:
        `ValueError`: for a text in place of a list, or a pattern that matches no tensor of any model.
    """
    if heads is None:
        return spec
    if isinstance(heads, str):
        raise ValueError(f"heads must be a list of name patterns; write heads=[{heads!r}].")
    idle = [pattern for pattern in heads if not any(matches(name, [pattern]) for state in states for name in state)]
    if idle:
        raise ValueError(
            f"heads names {listed(idle)}, which matches no tensor of the models; correct it or leave it out."
        )
    return replace(spec, heads=tuple(heads))


def check_models(states: Sequence[Mapping[str, Any]], spec: PermutationSpec) -> list[str]:
    """
    Holds the models against each other and against a specification.

    Returns:
        `list[str]`: names of the tensors to match: floating point, with a permuted axis, no heads and no statistics.

    Raises:
        `ValueError`: for names, shapes or ties that differ, tensors the specification does not cover or fit, patterns
            without tensors, and weights that are quantised, on the meta device or not finite.
    """
    body = [[name for name in state if not spec.is_head(name)] for state in states]
    different = sorted({name for names in body for name in names if any(name not in other for other in states)})
    if different:
        raise ValueError(
            f"Some models lack {listed(different)}; align models of one architecture, or name heads in heads=[...]."
        )
    everywhere = sorted({name for state in states for name in state})
    unused = spec.missing(everywhere)
    if unused:
        raise ValueError(
            f"The specification's patterns {listed(unused)} match no tensor; correct them, or name them in optional."
        )
    for name in body[0]:
        shapes = list(dict.fromkeys(tuple(state[name].shape) for state in states if isinstance(state[name], Tensor)))
        if len(shapes) > 1:
            raise ValueError(
                f"Tensor '{name}' has shapes {' and '.join(map(str, shapes))}; align models of one architecture, or "
                "name heads in heads=[...]."
            )
    for label, state in enumerate(states):
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                _check_tensor(name, tensor, f"model {label}")
                if tensor.is_floating_point():
                    spec.check_shape(name, tensor.shape)
    _check_ties(states, spec, [name for name in body[0] if isinstance(states[0][name], Tensor)])
    first = states[0]
    return [
        name
        for name in body[0]
        if isinstance(first[name], Tensor)
        and first[name].is_floating_point()
        and not is_statistic(name, first)
        and any(axis is not None for axis in spec.axes_of(name, first[name].ndim))
    ]


def _check_tensor(name: str, tensor: Tensor, label: str) -> None:
    if tensor.device.type == "meta":
        raise ValueError(
            f"Tensor '{name}' of {label} is on the meta device and has no values; load the weights first."
        )
    integers = not tensor.is_floating_point() and tensor.dtype != torch.bool and matches(name, QUANTISED)
    if integers or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
        raise ValueError(f"Tensor '{name}' of {label} is quantised ({tensor.dtype}); dequantise the model first.")
    if tensor.is_floating_point() and not all_finite(tensor):
        raise ValueError(f"Tensor '{name}' of {label} has entries that are not finite; nothing was aligned.")


def _check_ties(states: Sequence[Mapping[str, Any]], spec: PermutationSpec, names: Sequence[str]) -> None:
    """Tied names must be so in all models, in memory or by their values, and have the same axes."""
    for state in states:
        for leader, *others in tied_groups([state], names).values():
            for other in others:
                if any(not torch.equal(model[leader], model[other]) for model in states):
                    raise ValueError(
                        f"Tensors '{leader}' and '{other}' are tied in one model and differ in another; tie them in all "
                        "or in none."
                    )
                ndim = state[leader].ndim
                if spec.axes_of(leader, ndim) != spec.axes_of(other, ndim):
                    raise ValueError(
                        f"Tensors '{leader}' and '{other}' are tied, but the specification orders them differently; give "
                        "both the same axes."
                    )
