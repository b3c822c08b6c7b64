"""Which entries of a task vector are kept: exact top-k by magnitude, and reproducible random masks."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


_DIGIT_BITS = 16


def kept_count(fraction: float, numel: int) -> int:
    """`floor(fraction * numel)`, safe against products such as `0.29 * 100 = 28.999999999999996`."""
    return min(numel, int(fraction * numel * (1 + 1e-12)))


def kth_magnitude(chunks: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> tuple[float, int]:
    """
    Exact k-th largest magnitude over many tensors, in constant memory.

    Non-negative floats are ordered like their bit patterns read as integers, so the value is found 16 bits at a time
    from histograms of 65536 bins: two passes for float32, four for float64. Every pass after the first looks only at
    the entries that share the bits found so far.

    Args:
        chunks (`Callable[[], Iterable[Tensor]]`):
            Called once per pass; yields finite tensors of any shape.
        k (`int`):
            Rank, from 1 to the number of entries.
        dtype (`torch.dtype`):
            `torch.float32` or `torch.float64`; must hold all entries exactly.

    Returns:
        `tuple[float, int]`: the k-th largest magnitude, and how many entries *equal* to it belong to the k largest.
    """
    width, pattern_dtype, code = (64, torch.int64, "qd") if dtype == torch.float64 else (32, torch.int32, "if")
    prefix, remaining = 0, k
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for chunk in chunks():
            pattern = chunk.detach().to(dtype).abs().reshape(-1).view(pattern_dtype)
            if shift + _DIGIT_BITS < width:
                pattern = pattern[(pattern >> (shift + _DIGIT_BITS)) == prefix]
            digit = (pattern >> shift) & ((1 << _DIGIT_BITS) - 1)
            counts += torch.bincount(digit, minlength=counts.numel()).cpu()
        at_least = counts.flip(0).cumsum(0)
        position = int(torch.searchsorted(at_least, remaining))
        if position == counts.numel():
            raise ValueError(f"Asked for magnitude number {k} of only {int(at_least[-1])} entries.")
        digit_value = counts.numel() - 1 - position
        remaining -= int(at_least[position] - counts[digit_value])
        prefix = (prefix << _DIGIT_BITS) | digit_value
    value = struct.unpack(f"<{code[1]}", struct.pack(f"<{code[0]}", prefix))[0]
    return value, remaining


def magnitude_mask(tensor: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """
    Marks entries above the threshold and, lowest flat index first, up to `ties` entries that equal it.

    Args:
        tensor (`Tensor`):
            Float32 or float64, any shape.
        threshold (`float`):
            A magnitude from [`kth_magnitude`].
        ties (`int`):
            How many entries equal to the threshold may still be kept.

    Returns:
        `tuple[Tensor, int]`: boolean mask of the same shape, and the ties left for the next tensor.
    """
    magnitude = tensor.detach().abs()
    mask = magnitude > threshold
    # Zeros need no places: keeping or dropping them gives the same task vector.
    if ties > 0 and threshold > 0:
        chosen = (magnitude == threshold).reshape(-1).nonzero().reshape(-1)[:ties]
        mask.view(-1)[chosen] = True
        ties -= chosen.numel()
    return mask, ties


def top_mask(tensor: Tensor, k: int) -> Tensor:
    """Boolean mask of the k non-zero entries of largest magnitude in one float32 or float64 tensor (fewer if scarce)."""
    if k <= 0 or tensor.numel() == 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    if k >= tensor.numel():
        return torch.ones_like(tensor, dtype=torch.bool)
    if tensor.numel() > 1 << _DIGIT_BITS:
        threshold, ties = kth_magnitude(lambda: [tensor], k, tensor.dtype)
    else:
        # Sorting beats histograms that have more bins than there are entries.
        ranked = tensor.detach().abs().reshape(-1).sort(descending=True).values
        threshold = float(ranked[k - 1])
        ties = k - int((ranked > threshold).sum())
    return magnitude_mask(tensor, threshold, ties)[0]


def random_mask(shape: torch.Size, density: float, seed: int, key: str, task: str) -> Tensor:
    """
    Boolean CPU mask whose entries are kept with probability `density`.

    The generator is seeded by SHA-256 of (seed, tensor name, task name): the mask is the same in every process, for
    every hash seed and input order, and differs between tensors and tasks.
    """
    digest = hashlib.sha256(json.dumps([int(seed), key, task]).encode()).digest()
    generator = torch.Generator(device="cpu")
    # Torch takes at most 64 bits, signed.
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < density
