"""Buffers: pooled BatchNorm statistics, counters and everything that must never see arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .tensors import check_weights, listed


MEAN, VARIANCE, COUNTER = "running_mean", "running_var", "num_batches_tracked"


def merge_buffers(
    buffers: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """
    Merges the buffers of T models.

    BatchNorm statistics are pooled as if the models' data had been put together: `mean = sum_t p_t mean_t` and
    `var = sum_t p_t (var_t + mean_t**2) - mean**2`, never negative, with `p = weights / sum(weights)`. Other floating
    buffers take the weighted mean, `num_batches_tracked` the maximum, all other integer and boolean buffers the value
    of `base`.

    Args:
        buffers (`Sequence[Mapping[str, Tensor]]`):
            T mappings from buffer name to tensor, each with all keys of `base`, same shapes.
        base (`Mapping[str, Tensor]`):
            Buffers of the base model; fixes keys, order and dtypes of the result.
        weights (`Sequence[float]`, *optional*):
            T weights. Shares need non-negative weights with a positive sum; others count as equal.

    Returns:
        `dict[str, Tensor]`: new tensors with the keys and dtypes of `base`, bit-equal for any order of the models.
        With no models at all, a copy of `base`.

    Raises:
        `ValueError`: if a key is missing or the number of weights is wrong.
    """
    values = check_weights(weights, len(buffers))
    missing = sorted({key for mapping in buffers for key in base if key not in mapping})
    if missing:
        raise ValueError(f"These buffers of the base are missing in some model: {listed(missing)}.")
    shares = _shares(values)
    merged: dict[str, Tensor] = {}
    for key, reference in base.items():
        stem, _, leaf = key.rpartition(".")
        tensors = [mapping[key].detach().to(reference.device) for mapping in buffers]
        if not tensors:
            result = reference.detach().clone()
        elif reference.is_floating_point():
            mean_key = f"{stem}.{MEAN}" if stem else MEAN
            means = [mapping[mean_key] for mapping in buffers] if leaf == VARIANCE and mean_key in base else None
            result = _pool_variance(tensors, means, shares) if means else _average(tensors, shares)
        elif leaf == COUNTER:
            result = torch.stack(tensors).amax(dim=0)
        else:
            result = reference.detach().clone()
        merged[key] = result.to(reference.dtype)
    return merged


def is_statistic(key: str, keys: Mapping[str, Tensor]) -> bool:
    """Whether a key names the running mean or variance of a normalisation layer (both must be there)."""
    stem, dot, leaf = key.rpartition(".")
    return leaf in (MEAN, VARIANCE) and all(f"{stem}{dot}{name}" in keys for name in (MEAN, VARIANCE))


def _shares(weights: Sequence[float]) -> list[float]:
    # A pooled variance is one of a mixture, and a mixture has no negative parts.
    if any(weight < 0 for weight in weights) or not any(weights):
        weights = [1.0] * len(weights)
    total = sum(sorted(weights))
    return [weight / total for weight in weights]


def _average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    terms = torch.stack([tensor.double() * share for tensor, share in zip(tensors, shares, strict=True)])
    # Sorted terms are added in the same order whatever the order of the models.
    return terms.sort(dim=0).values.sum(dim=0)


def _pool_variance(variances: Sequence[Tensor], means: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    # The centred form equals mean(var + mu^2) - mean(mu)^2 and does not cancel.
    means = [mean.detach().to(variance.device).double() for mean, variance in zip(means, variances, strict=True)]
    pooled = _average(means, shares)
    spread = [variance.double() + (mean - pooled) ** 2 for variance, mean in zip(variances, means, strict=True)]
    return _average(spread, shares).clamp_(min=0)
