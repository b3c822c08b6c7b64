"""Activations in place of weights: what matching by activations compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from ..merging.data_driven.batches import batches, device_of, evaluating, model_inputs
from ..merging.plan import matches
from ..merging.tensors import all_finite
from .problem import Problem, build_problem
from .spec import Axis, PermutationSpec


# Rows (tokens, pixels) kept of every layer, spread over the batches.
MAX_ROWS = 4096

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def feature_problem(
    models: Sequence[Any], spec: PermutationSpec, data: Any, order: Sequence[int], device: torch.device | None
) -> Problem:
    """
    The problem of matching units by what they respond with, standardised per unit.

    Args:
        models (`Sequence[nn.Module]`): modules, where `data` has to be run through them.
        spec ([`PermutationSpec`]): groups and axes.
        data (`Iterable`): batches of a DataLoader, the same for all models; or per model a mapping from an axis, such
            as `"M.0"` or `"A.0:q"`, to a tensor of shape (samples, units), rows in the same order for all models.
        order (`Sequence[int]`): the order of the models in the problem.
        device (`torch.device`, *optional*): where to put the features.

    Raises:
        `ValueError`: without data, for state dicts that cannot be run, or features that do not fit each other or are
            not finite.
    """
    if data is None:
        raise ValueError("method='activations' needs data: a DataLoader, or one mapping of features per model.")
    given = _given(data, len(models), spec)
    if given is None:
        if not all(isinstance(model, nn.Module) for model in models):
            raise ValueError(
                "State dicts cannot be run on data; pass the modules, or one mapping of features per model."
            )
        layers, states = _collect([models[index] for index in order], spec, data)
    else:
        layers, states = {axis: axis for axis in given[0]}, [dict(given[index]) for index in order]
    for layer in sorted(layers):
        if not all(all_finite(state[layer]) for state in states):
            raise ValueError(f"Features '{layer}' have entries that are not finite; nothing was aligned.")
    names = {layer: f"layer{number}" for number, layer in enumerate(sorted(layers))}
    axes: dict[str, tuple[Axis, ...]] = {names[layer]: (None, axis) for layer, axis in layers.items()}
    features = PermutationSpec(spec.groups, axes)
    scaled = [{names[layer]: _standardised(state[layer]) for layer in names} for state in states]
    return build_problem(features, scaled, names.values(), device)


def _given(data: Any, count: int, spec: PermutationSpec) -> list[Mapping[str, Tensor]] | None:
    """The features, if that is what the data are, checked against the groups and each other."""
    if not isinstance(data, Sequence) or not all(isinstance(item, Mapping) for item in data):
        return None
    if not all(name.partition(":")[0].partition("*")[0] in spec.groups for item in data for name in item):
        return None
    if len(data) != count:
        raise ValueError(f"Got features of {len(data)} models for {count} models; give one mapping per model.")
    for name in sorted({name for item in data for name in item}):
        shapes = [tuple(item[name].shape) if name in item else None for item in data]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"Features '{name}' have shapes {', '.join(map(str, shapes))}; all models must see the same rows."
            )
        size = sum(view.size for view in spec.views(name))
        if shapes[0] is None or len(shapes[0]) != 2 or shapes[0][1] != size:
            raise ValueError(f"Features '{name}' have shape {shapes[0]}; give (samples, {size}).")
    lacking = sorted(set(spec.groups) - {name.partition(":")[0].partition("*")[0] for name in data[0]})
    if lacking:
        raise ValueError(f"The features lack the groups {', '.join(lacking)}; give features for every group.")
    return list(data)


def _standardised(features: Tensor) -> Tensor:
    """Every unit with mean 0 and norm 1, float32; units that never change are 0."""
    centred = features.double() - features.double().mean(dim=0)
    norms = centred.norm(dim=0)
    return (centred / norms.where(norms > 0, 1.0)).float()


def _collect(
    models: Sequence[nn.Module], spec: PermutationSpec, data: Iterable
) -> tuple[dict[str, Axis], list[dict[str, Tensor]]]:
    """Axes of the observed layers by name, and by model their outputs, (rows, units)."""
    layers = _observed(models[0], spec)
    sizes = {layer: sum(view.size for view in spec.views(axis)) for layer, axis in layers.items()}
    kept: list[dict[str, list[Tensor]]] = [{} for _ in models]
    count = len(data) if isinstance(data, Sized) else 8
    per_batch = -(-MAX_ROWS // max(count, 1))
    rows = 0
    with torch.no_grad(), evaluating(*models):
        for batch, _ in batches(data, None, device_of(models[0])):
            for model, found in zip(models, kept, strict=True):
                for layer, output in _outputs(model, list(layers), batch):
                    values = _rows(output, model.get_submodule(layer), sizes[layer], batch)
                    stride = max(1, -(-len(values) // per_batch))
                    found.setdefault(layer, []).append(values[::stride].float().cpu())
            rows += per_batch
            if rows >= MAX_ROWS:
                break
    used = {layer: axis for layer, axis in layers.items() if layer in kept[0]}
    return used, [{layer: torch.cat(parts) for layer, parts in found.items()} for found in kept]


def _observed(model: nn.Module, spec: PermutationSpec) -> dict[str, Axis]:
    """Layers whose outputs stand for a group: norms where it has some, else what writes to it."""
    norms: dict[str, Axis] = {}
    writers: dict[str, Axis] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not name or not isinstance(weight, Tensor) or spec.is_head(f"{name}.weight"):
            continue
        if isinstance(module, nn.Embedding):
            continue
        axes = spec.axes_of(f"{name}.weight", weight.ndim)
        stored = any(matches(f"{name}.weight", (pattern, f"*.{pattern}")) for pattern in spec.transposed)
        axis = axes[1] if stored else axes[0]
        if axis is not None:
            (norms if weight.ndim == 1 else writers)[name] = axis
    covered = {view.variable for axis in norms.values() for view in spec.views(axis)}
    extra = {
        name: axis for name, axis in writers.items() if any(view.variable not in covered for view in spec.views(axis))
    }
    return norms | extra


def _outputs(model: nn.Module, layers: Sequence[str], batch: Any) -> Iterator[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda _, __, output, layer=layer: seen.append((layer, output))
        )
        for layer in layers
    ]
    try:
        args, kwargs = model_inputs(batch)
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return iter(seen)


def channels_last(output: Tensor, module: nn.Module, size: int) -> Tensor:
    """A layer's output with its channels as the last dimension; images have them second whatever the module."""
    first = isinstance(module, _CHANNELS_FIRST) or (output.ndim == 4 and output.shape[1] == size)
    return output.movedim(1, -1) if first and output.ndim > 2 else output


def _rows(output: Tensor, module: nn.Module, size: int, batch: Any) -> Tensor:
    """(rows, units), padding left out."""
    return unpadded(channels_last(output.detach(), module, size), batch)


def unpadded(values: Tensor, batch: Any) -> Tensor:
    """Rows of a tensor with its channels last, without the tokens that an attention mask leaves out."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and values.ndim == 3 and mask.shape == values.shape[:2]:
        return values[mask != 0]
    return values.reshape(-1, values.shape[-1])
