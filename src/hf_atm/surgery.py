"""Gradient surgery on task vectors, computed on their inner products alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .seeding import derive_seed
from .spaces import TaskVector


def pcgrad(gram: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """PCGrad (https://huggingface.co/papers/2001.06782): each vector loses what conflicts with another one.

    Vector t visits the others in a random order; whenever its inner product with s is negative, its projection on the
    original s is taken away. Vectors that do not conflict stay as they are.

    Args:
        gram (`Tensor`): `(T, T)`, float64, inner products of the task vectors.
        names (`Sequence[str]`): T task names; with `seed` they decide each order, so that the order of tasks does not.
        seed (`int`): decides the orders.

    Returns:
        `Tensor`: `(T, T)`, float64; row t holds the coefficients of the vectors that make up the new vector t.
    """
    ordered = sorted(range(len(names)), key=lambda index: names[index])
    result = torch.eye(len(names), dtype=torch.float64)
    for t, name in enumerate(names):
        generator = torch.Generator().manual_seed(derive_seed(seed, "pcgrad", name))
        others = [s for s in ordered if s != t]
        for index in torch.randperm(len(others), generator=generator).tolist():
            s = others[index]
            product = result[t] @ gram[:, s]
            if product < 0:
                result[t, s] -= product / gram[s, s]
    return result


def gram_schmidt(gram: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """Each vector loses its projection on those before it, in a random order of tasks; lengths are not restored.

    Args:
        gram (`Tensor`): `(T, T)`, float64, inner products of the task vectors.
        names (`Sequence[str]`): T task names; with `seed` they decide the order.
        seed (`int`): decides the order.

    Returns:
        `Tensor`: `(T, T)`, float64, as from [`pcgrad`]. A vector within the span of earlier ones becomes zero.
    """
    ordered = sorted(range(len(names)), key=lambda index: names[index])
    generator = torch.Generator().manual_seed(derive_seed(seed, "gram_schmidt"))
    result = torch.eye(len(names), dtype=torch.float64)
    done: list[int] = []
    for index in torch.randperm(len(names), generator=generator).tolist():
        t = ordered[index]
        for s in done:
            length = result[s] @ gram @ result[s]
            # What is left of a dependent vector is rounding, and a projection on it would be noise.
            if length > 1e-12 * gram[s, s]:
                result[t] -= (result[t] @ gram @ result[s]) / length * result[s]
        done.append(t)
    return result


SURGERIES = {"pcgrad": pcgrad, "gram_schmidt": gram_schmidt}


class MixedTaskVector(TaskVector):
    """A linear combination of task vectors, multiplied out when it is read.

    Args:
        vectors (`Sequence[TaskVector]`): T vectors with the same names.
        coefficients (`Sequence[float]`): T factors.
    """

    def __init__(self, vectors: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> None:
        self.terms = [(v, c) for v, c in zip(vectors, coefficients, strict=True) if c != 0]
        self.names = list(vectors[0])

    def read(self, name: str) -> Tensor:
        vector, coefficient = self.terms[0]
        total = vector[name] * coefficient
        for vector, coefficient in self.terms[1:]:
            total.add_(vector[name], alpha=coefficient)
        return total

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.names}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
