"""Weights of single entries in a mean of task vectors, from what AdamW knows about each task's gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .moments import inner_optimizer


# AdamW's own guard against dividing by nothing; here it makes entries that no task moved a plain mean.
_EPSILON = 1e-8


def entry_weights(
    optimizer: Any, parameters: Mapping[str, Tensor], exponent: float, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """How much each entry matters to the task that the optimizer has just tuned: `(sqrt(v) + 1e-8) ** (2 exponent)`.

    v is AdamW's second moment, an average of the entry's squared gradients, corrected for its start at zero. With an
    exponent of 1 this is the diagonal of the empirical Fisher information that the optimizer has gathered anyway
    (Fisher merging, https://huggingface.co/papers/2111.09832); 0 gives a plain mean, 0.5 weights by the size of a
    typical gradient.

    Args:
        optimizer: a torch optimizer, or Accelerate's wrapper of one.
        parameters (`Mapping[str, Tensor]`): live parameters by name.
        exponent (`float`): above 0.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the weights are to be.

    Returns:
        `dict[str, Tensor]`: weights by name, float32, of the parameters' shapes.

    Raises:
        ValueError: when the optimizer has no second moments.
    """
    check_second_moments(optimizer)
    inner = inner_optimizer(optimizer)
    decay = {parameter: group["betas"][1] for group in inner.param_groups for parameter in group["params"]}
    weights = {}
    for name, parameter in parameters.items():
        state = inner.state.get(parameter, {})
        if not state:
            # Not in any graph of this task.
            weights[name] = torch.full(parameter.shape, _EPSILON ** (2 * exponent), device=device)
            continue
        correction = 1 - decay[parameter] ** float(state["step"])
        root = (state["exp_avg_sq"].detach().to(device, torch.float32) / correction).sqrt_()
        weights[name] = root.add_(_EPSILON).pow_(2 * exponent)
    return weights


def check_second_moments(optimizer: Any) -> None:
    """Refuse an optimizer that keeps no second moments of single entries.

    Raises:
        ValueError: naming its class.
    """
    inner = inner_optimizer(optimizer)
    if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        raise ValueError(
            f"moment_exponent needs AdamW's second moments, and {type(inner).__name__} has none; choose "
            "optim='adamw_torch_fused', or moment_exponent=0."
        )


def entrywise_mean(
    vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """`sum_t c_t e_t tau_t / sum_t c_t e_t`, entry by entry.

    Args:
        vectors (`Sequence[Mapping[str, Tensor]]`): T task vectors.
        weights (`Sequence[Mapping[str, Tensor]]`): e, T mappings with the same names and shapes.
        coefficients (`Sequence[float]`): c, T numbers from 0, not all of them 0.

    Returns:
        `dict[str, Tensor]`: float32, by name.
    """
    merged = {}
    for name in vectors[0]:
        total, weight = torch.zeros_like(vectors[0][name]), torch.zeros_like(weights[0][name])
        for vector, entry, coefficient in zip(vectors, weights, coefficients, strict=True):
            total.addcmul_(entry[name], vector[name], value=coefficient)
            weight.add_(entry[name], alpha=coefficient)
        merged[name] = total.div_(weight)
    return merged
