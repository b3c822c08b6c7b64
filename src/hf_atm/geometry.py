"""Norms and cosines of task vectors: exact where the vectors are held, sketched where only their sum is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .seeding import derive_seed


_CHUNK = 1 << 20


def squared_norm(tensor: Tensor) -> float:
    """Squared L2 norm of a tensor of any shape and floating dtype, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def gram_matrix(vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Inner products of task vectors.

    Args:
        vectors (`Sequence[Mapping[str, Tensor]]`): T mappings with the same names and shapes.

    Returns:
        `Tensor`: `(T, T)`, float64. Temporaries are bounded by T chunks of 8 MiB.
    """
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for name in sorted(vectors[0]):
        rows = [vector[name].reshape(-1) for vector in vectors]
        for start in range(0, rows[0].numel(), _CHUNK):
            chunk = torch.stack([row[start : start + _CHUNK].double() for row in rows])
            gram += (chunk @ chunk.T).cpu()
    return gram


def cosines(gram: Tensor) -> Tensor:
    """Cosines from inner products, `(T, T)`, float64, within `[-1, 1]`; 0 for a zero vector."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    products = norms[:, None] * norms[None, :]
    return torch.where(products > 0, gram / products.clamp_min(torch.finfo(gram.dtype).tiny), 0.0).clamp(-1, 1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of one shape, float64, within `[-1, 1]`; 0 for a zero tensor."""
    return float(cosines(gram_matrix([{"": a}, {"": b}]))[0, 1])


class Sketch:
    """A small linear image of a task vector that keeps inner products on average.

    The vector, all tensors end to end, is cut into blocks of `width` entries, and the blocks are added with random
    signs. Signs depend on the block alone, so one matrix-vector product sketches a tensor. A vector of up to `width`
    entries is kept as it is. The error of a cosine is about 1 / sqrt(width) = 0.002. `width` is prime, so that rows
    of a weight matrix never line up from block to block.
    """

    width = 262_139

    def __init__(self, numel: int, device: torch.device | str = "cpu") -> None:
        blocks = math.ceil(numel / self.width)
        generator = torch.Generator().manual_seed(derive_seed("sketch"))
        signs = torch.randint(0, 2, (blocks,), generator=generator, dtype=torch.float32) * 2 - 1
        self.signs = signs.to(device)
        self.values = torch.zeros(min(numel, self.width), device=device)
        self._offset = 0

    def add(self, tensor: Tensor) -> None:
        """Take in the next tensor of the vector; every vector must be given in the same order."""
        flat = tensor.reshape(-1).float()
        while flat.numel():
            block, within = divmod(self._offset, self.width)
            if within or flat.numel() < self.width:
                taken = min(self.width - within, flat.numel())
                self.values[within : within + taken].add_(flat[:taken] * self.signs[block])
            else:
                rows = flat.numel() // self.width
                taken = rows * self.width
                self.values.add_(self.signs[block : block + rows] @ flat[:taken].view(rows, self.width))
            self._offset += taken
            flat = flat[taken:]
