"""REPAIR: merged networks whose activations have the spread of those they were merged from (arXiv 2211.08403)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..merging.data_driven.batches import batches, device_of, evaluating, model_inputs
from ..merging.data_driven.recalibration import RunningMoments, recalibrate_batch_norm
from ..merging.tensors import listed
from .features import unpadded


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (nn.Linear, Conv1D)
TARGETS = ("variance", "std")


class _Seen(Exception):
    """Ends a forward pass once the layer in question has run."""


def repair(
    merged: nn.Module,
    endpoints: Sequence[nn.Module | Mapping[str, Tensor]],
    data: Iterable,
    layers: Sequence[str] | None = None,
    target: str = "variance",
    num_batches: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """
    Gives every unit of a merged network the mean and spread that it has in the networks it was merged from.

    Averaging networks cancels part of what each unit responds with, the more the deeper the layer. Layer by layer, in
    the order in which they run, earlier ones being corrected already, outputs with mean m and deviation s are mapped to
    mean m* and deviation s* of the endpoints: `W <- (s*/s) W`, `b <- (s*/s) (b - m) + m*`. A network with BatchNorm has
    its statistics measured anew instead, which comes to the same (its convolutions' scale cancels).

    Cost: one pass of every endpoint over the data, and one of the merged network per layer, up to that layer.

    Args:
        merged (`nn.Module`): the merged network; not changed.
        endpoints (`Sequence[nn.Module | Mapping[str, Tensor]]`): the networks it was merged from, *aligned*: modules, or
            state dicts such as `Alignment.state_dicts`.
        data (`Iterable`): batches of a DataLoader: training data without augmentation. It is run through many times.
        layers (`Sequence[str]`, *optional*): names of modules to correct; by default all convolutions and linear layers
            but the one that runs last, whose outputs are the predictions.
        target (`str`, *optional*, defaults to `"variance"`): s*^2 is the mean of the endpoints' variances; with `"std"`,
            s* the mean of their deviations.
        num_batches (`int`, *optional*): how many batches to use, at least 1; all by default.
        inputs (`Mapping[str, Any]`, *optional*): further keywords of the model, such as `{"task": "mnist"}`. Tokens that
            an `attention_mask` leaves out do not count.

    Returns:
        `nn.Module`: a corrected copy. Convolutions without a bias get one; linear layers without one are scaled only, so
        that their architecture stays what it was.

    Raises:
        `ValueError`: without endpoints or batches, for layers that do not exist or never run, or an unknown target.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.alignment import repair

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> same = repair(model, [model, model], [torch.randn(16, 2)])
    >>> torch.allclose(same[0].weight, model[0].weight, atol=1e-5)
    True
    ```
    """
    _check(merged, endpoints, layers, target, num_batches)
    model = copy.deepcopy(merged)
    if num_batches is not None or isinstance(data, Iterator):
        # The same batches in every pass; an iterator would be empty after the first.
        data = list(islice(iter(data), num_batches))
    if any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        for module in model.modules()
    ):
        return recalibrate_batch_norm(model, data, inputs=inputs, disable_tqdm=True)
    with torch.no_grad():
        names, repeated = _in_order(model, data, inputs, layers)
        targets = _targets(model, endpoints, data, inputs, names, target)
        for name in names:
            moments = _measure(model, data, inputs, [name], stop=name not in repeated)[name]
            _correct(model.get_submodule(name), moments, *targets[name])
    return model


def _check(
    merged: nn.Module, endpoints: Sequence[Any], layers: Sequence[str] | None, target: str, num_batches: int | None
) -> None:
    if isinstance(endpoints, (nn.Module, Mapping)) or not endpoints:
        raise ValueError("endpoints must list the aligned models that were merged; give at least one.")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; choose one of {', '.join(TARGETS)}.")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches={num_batches} leaves nothing to measure; give at least 1.")
    known = {name for name, module in merged.named_modules() if isinstance(module, (*_CONVOLUTIONS, *_LINEAR))}
    unknown = sorted(set(layers or ()) - known)
    if unknown:
        raise ValueError(f"layers names {listed(unknown)}, no convolution or linear layer of the model; correct it.")
    own = merged.state_dict()
    for endpoint in endpoints:
        state = endpoint.state_dict() if isinstance(endpoint, nn.Module) else endpoint
        different = sorted(name for name in own if name not in state or state[name].shape != own[name].shape)
        if different:
            raise ValueError(
                f"An endpoint lacks {listed(different)}, or has it in another shape; give aligned models."
            )


def _in_order(
    model: nn.Module, data: Iterable, inputs: Any, layers: Sequence[str] | None
) -> tuple[list[str], set[str]]:
    """The layers to correct, as they run, and those that run more than once in a pass."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, *_LINEAR))
    ]
    try:
        with evaluating(model):
            batch, _ = next(batches(data, None, device_of(model)))
            args, kwargs = model_inputs(batch, inputs)
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    order, repeated = list(dict.fromkeys(ran)), {name for name, count in Counter(ran).items() if count > 1}
    if layers is None:
        return [name for name in order if name != ran[-1]], repeated
    idle = sorted(set(layers) - set(order))
    if idle:
        raise ValueError(f"The layers {listed(idle)} do not run on these data; leave them out.")
    return [name for name in order if name in set(layers)], repeated


def _targets(
    model: nn.Module, endpoints: Sequence[Any], data: Iterable, inputs: Any, names: Sequence[str], target: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance to aim at, by layer, float64."""
    scratch = copy.deepcopy(model)
    seen = []
    for endpoint in endpoints:
        scratch.load_state_dict(endpoint.state_dict() if isinstance(endpoint, nn.Module) else dict(endpoint))
        seen.append(_measure(scratch, data, inputs, names))
    result = {}
    for name in names:
        means = torch.stack([torch.as_tensor(moments[name].mean) for moments in seen])
        variances = torch.stack([_variance(moments[name]) for moments in seen])
        spread = variances.mean(0) if target == "variance" else variances.sqrt().mean(0).square()
        result[name] = means.mean(0), spread
    return result


def _measure(
    model: nn.Module, data: Iterable, inputs: Any, names: Sequence[str], stop: bool = False
) -> dict[str, RunningMoments]:
    """Moments of the outputs of some layers, per unit."""
    found = {name: RunningMoments() for name in names}
    given: dict[str, Any] = {}

    def observe(name: str, module: nn.Module, output: Tensor) -> None:
        rows = output.detach()
        if isinstance(module, _CONVOLUTIONS):
            found[name].add(rows.transpose(0, 1).flatten(1).T)
        else:
            found[name].add(unpadded(rows, given))
        if stop:
            raise _Seen

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: observe(name, module, output)
        )
        for name in names
    ]
    try:
        with evaluating(model):
            for batch, _ in batches(data, None, device_of(model)):
                args, kwargs = model_inputs(batch, inputs)
                given.clear()
                given.update(kwargs)
                try:
                    model(*args, **kwargs)
                except _Seen:
                    pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _variance(moments: RunningMoments) -> Tensor:
    return torch.as_tensor(moments.squares) / moments.count


def _correct(layer: nn.Module, moments: RunningMoments, mean: Tensor, variance: Tensor) -> None:
    own = _variance(moments)
    # A unit that is constant here, or in all endpoints, has no spread to restore.
    scale = torch.where(
        (own > 0) & (variance > 0), (variance / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt(), 1.0
    )
    weight: Any = layer.weight
    shape = [1] * weight.ndim
    shape[-1 if isinstance(layer, Conv1D) else 0] = -1
    weight.copy_(weight.double() * scale.reshape(shape))
    bias: Any = layer.bias
    if bias is None and isinstance(layer, _LINEAR):
        return
    before = torch.zeros_like(scale) if bias is None else bias.double()
    after = scale * (before - moments.mean) + mean
    if bias is None:
        layer.bias = nn.Parameter(after.to(weight.dtype))
    else:
        bias.copy_(after)
