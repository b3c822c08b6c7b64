"""Weights as shares of a whole, for means on curved spaces and means with matrix or entry weights."""

from __future__ import annotations

from collections.abc import Sequence

from .linear import linear_coefficients


def shares(method: str, weights: Sequence[float]) -> list[float]:
    """
    `w_t / sum_t w_t` for methods that cannot extrapolate.

    Args:
        method (`str`):
            Name of the method, for the message.
        weights (`Sequence[float]`):
            T weights.

    Returns:
        `list[float]`: T non-negative numbers whose sum is 1.

    Raises:
        `ValueError`: if a weight is negative, or all are zero.
    """
    if any(weight < 0 for weight in weights):
        raise ValueError(
            f"Merge method '{method}' takes no negative weights, got {list(weights)}; give the shares of the models."
        )
    return linear_coefficients("mean", weights)
