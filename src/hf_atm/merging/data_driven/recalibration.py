"""BatchNorm recalibration: statistics of a merged model, measured instead of pooled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import batches, device_of, evaluating, model_inputs, observing, progress_bar


class RunningMoments:
    """Count, mean and sum of squared deviations per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> Tensor:
        """Takes in `(count, channels)`; returns the mean and biased variance of these values alone, stacked."""
        values = values.double()
        count, mean = len(values), values.mean(dim=0)
        squares = (values - mean).square().sum(dim=0)
        # The centred update does not cancel, unlike E[x^2] - E[x]^2.
        total, shift = self.count + count, mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.count = total
        return torch.stack([mean, squares / count])


def recalibrate_batch_norm(
    model: nn.Module,
    dataloader: Iterable,
    num_batches: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
) -> nn.Module:
    """
    Measures the running statistics of every BatchNorm layer anew, in place.

    Averaged statistics do not fit the activations of averaged weights. One pass over the data, each layer normalising
    by the batch's own statistics as in training, gives those of all activations that a layer saw: their mean and their
    unbiased variance, `(sum_b n_b var_b + sum_b n_b (mean_b - mean)**2) / (n - 1)`. Unlike torch's cumulative average
    this is exact for batches of different sizes. Layers behind the first depend a little on the batch size; prefer
    large batches. Dropout is off, parameters, modes and `momentum` stay as they are.

    Args:
        model (`nn.Module`):
            A model with BatchNorm layers that track statistics.
        dataloader (`Iterable`):
            Batches: mappings (passed as keywords), tensors, or tuples whose first item is the input.
        num_batches (`int`, *optional*):
            How many batches to use, at least 1; all by default.
        inputs (`Mapping[str, Any]`, *optional*):
            Further keywords of the model, such as `{"task": "mnist"}`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        `nn.Module`: the same model; `num_batches_tracked` counts the batches used. After an error the statistics are
        those of before.

    Raises:
        `ValueError`: if there is no BatchNorm layer with running statistics, no batch, or `num_batches` is below 1.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import recalibrate_batch_norm

    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 2))
    >>> recalibrate_batch_norm(model, [torch.tensor([[1.0], [3.0]])], disable_tqdm=True)[0].running_mean
    tensor([2.])
    ```
    """
    layers: dict[nn.Module, RunningMoments] = {
        module: RunningMoments()
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    if not layers:
        raise ValueError("The model has no BatchNorm layer with running statistics; there is nothing to recalibrate.")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches={num_batches} leaves nothing to measure; give at least 1.")
    before = {module: [buffer.clone() for buffer in _buffers(module)] for module in layers}
    used = 0

    def observe(module: nn.Module, args: tuple) -> None:
        channels = args[0].detach().transpose(0, 1).flatten(1).T
        for buffer, value in zip(_buffers(module)[:2], layers[module].add(channels), strict=True):
            buffer.copy_(value)

    bar = progress_bar(num_batches, "Recalibrating", disable_tqdm)
    try:
        with evaluating(model), observing(dict.fromkeys(layers, observe)), torch.no_grad(), bar:
            for batch, _ in batches(dataloader, None, device_of(model)):
                args, kwargs = model_inputs(batch, inputs)
                model(*args, **kwargs)
                used += 1
                bar.update()
                if used == num_batches:
                    break
    except BaseException:
        for module, values in before.items():
            _write(module, values)
        raise
    for module, moments in layers.items():
        if moments.count:
            variance = torch.as_tensor(moments.squares) / max(moments.count - 1, 1)
            _write(module, [torch.as_tensor(moments.mean), variance, torch.tensor(used)])
    return model


def _buffers(module: Any) -> list[Tensor]:
    return [module.running_mean, module.running_var, module.num_batches_tracked]


def _write(module: nn.Module, values: Iterable[Tensor]) -> None:
    for buffer, value in zip(_buffers(module), values, strict=True):
        buffer.copy_(value)
