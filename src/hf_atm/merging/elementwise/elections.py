"""Sign election and merging of the values that agree, for task vectors of which entries were dropped before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from ..tensors import Task
from .chunks import Drop, merge_chunks, spans


_width = attrgetter("itemsize")

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Election:
    """How T values become one.

    Args:
        weights (`Sequence[float]`): T weights of the values.
        majority_sign_method (`str`): `"total"`: sign of the sum of the values; `"frequency"`: of their signs.
        weighted_vote (`bool`): whether votes are multiplied by the weights.
        merge_func (`str`): `"mean"`: weighted sum over the sum of the *absolute* agreeing weights (a signed divisor
            could exceed every input); `"sum"`: weighted sum; `"max"`: weighted value of largest magnitude.
        factor (`float`): what the result is multiplied by.
    """

    weights: Sequence[float]
    majority_sign_method: str = "total"
    weighted_vote: bool = False
    merge_func: str = "mean"
    factor: float = 1.0

    def votes(self, values: Sequence[Tensor]) -> Tensor:
        """Sums whose signs are elected, float64; 0 where the vote is a draw or nobody votes."""
        total = None
        for value, weight in zip(values, self.weights, strict=True):
            ballot = value if self.majority_sign_method == "total" else value.sign()
            total = _plus(total, ballot, weight if self.weighted_vote else 1.0)
        assert total is not None
        return total

    def merge(self, values: Sequence[Tensor], signs: Tensor) -> Tensor:
        """Combines, entry by entry, only the values that have the elected sign, -1 or 1 in float64; float64."""
        elected = signs.to(values[0].dtype)
        agreeing = (torch.relu(value * elected) for value in values)
        if self.merge_func == "max":
            merged = self._largest(agreeing, signs)
        else:
            merged = self._combined(agreeing).mul_(signs)
        return merged if self.factor == 1 else merged.mul_(self.factor)

    def _combined(self, agreeing: Iterable[Tensor]) -> Tensor:
        total = divisor = None
        for magnitude, weight in zip(agreeing, self.weights, strict=True):
            # Agreement looks at the value, not at the weighted value.
            total = _plus(total, magnitude, weight)
            if self.merge_func == "mean":
                divisor = _plus(divisor, magnitude.sign_(), abs(weight))
        assert total is not None
        return total if divisor is None else total.div_(divisor.clamp_(min=_TINY))

    def _largest(self, agreeing: Iterable[Tensor], signs: Tensor) -> Tensor:
        """The largest weighted magnitude with its sign; of equal ones that with a positive weight."""
        upward, downward = torch.zeros_like(signs), torch.zeros_like(signs)
        for magnitude, weight in zip(agreeing, self.weights, strict=True):
            side = upward if weight > 0 else downward
            torch.maximum(side, magnitude.to(side.dtype).mul_(abs(weight)), out=side)
        if min(self.weights) >= 0:
            return upward.mul_(signs)
        return torch.where(upward >= downward, upward, -downward).mul_(signs)


def merge_elected(
    tasks: Sequence[Task], key: str, drop: Drop, election: Election, majority: int | None = None, multiple: int = 1
) -> Tensor:
    """
    One tensor merged by election.

    Args:
        tasks (`Sequence[Task]`):
            T tasks.
        key (`str`):
            Name of the tensor.
        drop (`Callable`):
            `drop(key, start, chunks)` gives the T chunks of a tensor from flat index `start` on, zeros where entries are
            dropped.
        election (`Election`):
            How signs are elected and values combined.
        majority (`int`, *optional*):
            Sign that draws take; by default that of the sum of all elected signs of the tensor, plus if it is zero.
        multiple (`int`, *optional*, defaults to 1):
            Chunks are whole multiples of so many entries.

    Returns:
        `Tensor`: merged tensor, float32 (float64 for float64 inputs).
    """
    balance = 0
    drawn: list[tuple[int, Tensor, Tensor]] = []

    def combine(start: int, chunks: list[Tensor]) -> Tensor:
        nonlocal balance
        values = drop(key, start, chunks)
        votes = election.votes(values)
        if majority is not None:
            return election.merge(values, _settled(votes, majority))
        signs = votes.sign()
        balance += int(signs.sum())
        merged = election.merge(values, _settled(votes, 1))
        where = _contested(signs, merged, values, election)
        if len(where):
            # The majority is known at the end only; until then both outcomes are kept.
            minus = torch.full((len(where),), -1.0, dtype=signs.dtype, device=signs.device)
            outcome = election.merge([value[where] for value in values], minus)
            drawn.append((start, where.int(), outcome.to(max((value.dtype for value in values), key=_width))))
        return merged

    merged = merge_chunks(tasks, key, combine, multiple)
    if balance < 0:
        for start, where, outcome in drawn:
            merged.view(-1)[start + where.long()] = outcome.to(merged.dtype)
    return merged


def majority_sign(tasks: Sequence[Task], keys: Sequence[str], drop: Drop, election: Election) -> int:
    """The sign of the sum of all elected signs of some tensors, plus if it is zero; one read of the tensors."""
    balance = 0
    for key in keys:
        for start, stop in spans(tasks[0].shape(key).numel()):
            chunks = [task.chunk(key, start, stop) for task in tasks]
            balance += int(election.votes(drop(key, start, chunks)).sign_().sum())
    return -1 if balance < 0 else 1


def _settled(votes: Tensor, majority: int) -> Tensor:
    """Signs -1 and 1, draws with the majority; in place."""
    # Next to any other sum the addend vanishes.
    return votes.add_(majority * _TINY).sign_()


def _contested(signs: Tensor, merged: Tensor, values: Sequence[Tensor], election: Election) -> Tensor:
    """Indices of the entries without a sign for which somebody voted."""
    if min(election.weights) > 0:
        # Then somebody voted plus, and the merge with plus shows it.
        shown = merged
    else:
        shown = torch.stack([value.abs() for value in values]).amax(0)
    # NumPy's booleans are faster by an order of magnitude.
    draws = (signs.cpu().numpy() == 0) & (shown.cpu().numpy() != 0)
    return torch.from_numpy(np.flatnonzero(draws)).to(signs.device)


def _plus(total: Tensor | None, tensor: Tensor, coefficient: float) -> Tensor:
    """Adds to a float64 sum in place; starts one where there is none."""
    if total is not None:
        return total.add_(tensor, alpha=coefficient)
    first = tensor.to(torch.float64, copy=True)
    return first if coefficient == 1 else first.mul_(coefficient)
