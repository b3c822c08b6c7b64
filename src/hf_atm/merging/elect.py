"""Sign election and disjoint reduction of already trimmed task vectors, one tensor at a time (TIES, DARE-TIES)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import accumulation_dtype, result_dtype, weighted_sum


def elect_signs(trimmed: Sequence[Tensor], weights: Sequence[float], method: str, weighted: bool) -> Tensor:
    """
    Elects one sign per entry.

    Args:
        trimmed (`Sequence[Tensor]`):
            T tensors of one shape.
        weights (`Sequence[float]`):
            T weights, used only with `weighted`.
        method (`str`):
            `"total"`: sign of the sum of the values; `"frequency"`: sign of the sum of their signs.
        weighted (`bool`):
            Whether votes are multiplied by the weights.

    Returns:
        `Tensor`: int8 tensor of -1, 0 and 1; 0 where the vote is a draw or nobody votes.
    """
    ballots = (tensor if method == "total" else tensor.sign() for tensor in trimmed)
    votes = weights if weighted else [1.0] * len(trimmed)
    return weighted_sum(ballots, votes).sign().to(torch.int8)


def has_draw(trimmed: Sequence[Tensor], signs: Tensor) -> bool:
    """Whether some entry has voters but no elected sign."""
    draw = signs == 0
    return bool(draw.any()) and any(bool((tensor != 0).logical_and_(draw).any()) for tensor in trimmed)


def settle_draws(signs: Tensor, majority: int) -> Tensor:
    """Gives draws the sign of the majority over the scope, plus one if that is a draw too."""
    return torch.where(signs == 0, torch.full_like(signs, -1 if majority < 0 else 1), signs)


def disjoint_merge(trimmed: Sequence[Tensor], weights: Sequence[float], signs: Tensor, merge_func: str) -> Tensor:
    """
    Combines, entry by entry, only the values that agree with the elected sign.

    Args:
        trimmed (`Sequence[Tensor]`):
            T tensors of one shape; zeros take no part.
        weights (`Sequence[float]`):
            T weights. Agreement looks at the value, not at the weighted value.
        signs (`Tensor`):
            Elected signs of the same shape; entries with sign 0 become 0.
        merge_func (`str`):
            `"mean"`: weighted sum over the sum of the *absolute* agreeing weights (a signed divisor could exceed every
            input); `"sum"`: weighted sum; `"max"`: weighted value of largest magnitude, the first task winning ties.

    Returns:
        `Tensor`: float64 for float64 inputs, else float32.
    """
    dtype = accumulation_dtype(trimmed[0].dtype)
    total = torch.zeros(trimmed[0].shape, dtype=dtype, device=trimmed[0].device)
    divisor = torch.zeros_like(total) if merge_func == "mean" else None
    for tensor, weight in zip(trimmed, weights, strict=True):
        agrees = (tensor.sign() == signs) & (signs != 0)
        value = tensor.to(dtype).mul(weight).masked_fill_(~agrees, 0)
        if merge_func == "max":
            total = torch.where(value.abs() > total.abs(), value, total)
            continue
        total += value
        if divisor is not None:
            divisor.add_(agrees, alpha=abs(weight))
    if divisor is not None:
        total = torch.where(divisor > 0, total / divisor.clamp(min=torch.finfo(dtype).tiny), torch.zeros_like(total))
    return total.to(result_dtype(trimmed[0].dtype))
