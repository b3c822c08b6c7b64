"""One adapted module: what its factors mean, and how PEFT lays them out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import LowRank


PREFIX = "base_model.model."

# Endings of the two factors' names: linear and convolution layers, embeddings.
_ENDINGS = {False: (".lora_A.weight", ".lora_B.weight"), True: (".lora_embedding_A", ".lora_embedding_B")}


@dataclass(frozen=True)
class Layout:
    """How a module's weight lies in memory, against the matrix `(out, in)` that its factors make.

    Args:
        out (`int`): output features.
        inner (`tuple[int, ...]`): `(in,)`, or `(in, kernel...)` of a convolution, which counts as one long row.
        embedding (`bool`): whether the factors carry the names of an embedding's.
        transposed (`bool`): whether the weight is stored `(in, out)`: embeddings, and GPT-2's Conv1D.
    """

    out: int
    inner: tuple[int, ...]
    embedding: bool = False
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.out, math.prod(self.inner)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.inner, self.out) if self.transposed else (self.out, *self.inner)

    def weight(self, matrix: Tensor) -> Tensor:
        """The matrix `(out, in)` as a weight."""
        return matrix.T.contiguous() if self.transposed else matrix.reshape(self.weight_shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as the matrix `(out, in)`."""
        return weight.T if self.transposed else weight.reshape(self.shape)

    def store(self, module: str, factors: LowRank, dtype: torch.dtype) -> dict[str, Tensor]:
        """Both factors under PEFT's names and in PEFT's shapes."""
        kernel = (1,) * (len(self.inner) - 1)
        a = factors.right.reshape(factors.rank, *self.inner)
        b = factors.left.reshape(self.out, factors.rank, *kernel)
        pair = zip(_ENDINGS[self.embedding], (a, b), strict=True)
        return {f"{PREFIX}{module}{ending}": factor.to(dtype, copy=True).contiguous() for ending, factor in pair}


@dataclass(frozen=True)
class LoraModule:
    """One module's factors as stored, and the scale of their product.

    Args:
        a (`Tensor`): shape `(rank, in)`, or `(rank, in, kernel...)`.
        b (`Tensor`): shape `(out, rank)`, or `(out, rank, 1...)`.
        scale (`float`): s, alpha / rank or alpha / sqrt(rank).
        layout (`Layout`): of the weight.
    """

    a: Tensor
    b: Tensor
    scale: float
    layout: Layout

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def update(self) -> LowRank:
        """The exact update `s B A`, float64, the scale in the left factor."""
        left = self.b.detach().cpu().double().reshape(self.layout.out, self.rank) * self.scale
        return LowRank(left, self.a.detach().cpu().double().reshape(self.rank, -1))


def weight_name(module: str) -> str:
    """Name of the weight that a module's update is added to."""
    return f"{module}.weight"


def split_factors(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor, bool]], dict[str, Tensor], list[str]]:
    """
    Sorts an adapter's tensors.

    Args:
        state (`Mapping[str, Tensor]`): as `peft.get_peft_model_state_dict` gives it; the prefix `base_model.model.` may be
            missing.

    Returns:
        `tuple`: by module the factors A and B and whether they are an embedding's; by base name the other saved tensors;
        names of tensors that belong to an adapter but are no such pair.
    """
    rest = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    pairs = {}
    for embedding, (first, second) in _ENDINGS.items():
        for name in sorted(name for name in rest if name.endswith(first)):
            module = name.removesuffix(first)
            if f"{module}{second}" in rest:
                pairs[module] = (rest.pop(name), rest.pop(f"{module}{second}"), embedding)
    strange = sorted(name for name in rest if ".lora_" in name)
    return pairs, rest, strange
