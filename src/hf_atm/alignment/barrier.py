"""Loss barriers between two models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..analysis.landscape import barrier_height


def loss_barrier(
    a: nn.Module, b: nn.Module | Mapping[str, Tensor], loss: Callable[[nn.Module], float], steps: int = 25
) -> float:
    """
    How far the loss rises above the straight line between two models' losses on the way from one to the other.

    Parameters and floating-point buffers are interpolated. Models with BatchNorm need statistics of their own at every
    step: let `loss` call [`recalibrate_batch_norm`] first.

    Args:
        a (`nn.Module`):
            One end; not changed.
        b (`nn.Module` or `Mapping[str, Tensor]`):
            The other end, or its state dict, as [`Alignment`] holds them.
        loss (`Callable[[nn.Module], float]`):
            Loss of a model.
        steps (`int`, *optional*, defaults to 25):
            Models looked at, both ends included; at least 3.

    Returns:
        `float`: `max over lambda of L(lambda) - ((1 - lambda) L(0) + lambda L(1))`, at least 0.

    Raises:
        `ValueError`: for fewer than 3 steps, or models with other tensors.
    """
    if steps < 3:
        raise ValueError(f"steps={steps} leaves no model between the ends; give at least 3.")
    start = a.state_dict()
    end = b.state_dict() if isinstance(b, nn.Module) else b
    if start.keys() != end.keys() or any(start[name].shape != end[name].shape for name in start):
        raise ValueError("The two models differ in names or shapes of their tensors; compare models of one kind.")
    start = {name: tensor.clone() for name, tensor in start.items()}
    model = copy.deepcopy(a)
    losses = []
    for step in range(steps):
        share = step / (steps - 1)
        model.load_state_dict({name: _between(start[name], end[name], share) for name in start})
        losses.append(float(loss(model)))
    return barrier_height(losses)


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    end = end.to(start.device)
    if not start.is_floating_point():
        return start if share < 1 else end
    return torch.lerp(start.double(), end.double(), share).to(start.dtype)
