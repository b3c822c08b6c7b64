"""Sign election and merging of the values that agree, for task vectors of which entries were dropped before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import Drop, merge_chunks, spans
from .tensors import Task


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

    def signs(self, values: Sequence[Tensor]) -> Tensor:
        """Elected signs -1, 0 and 1 in float64; 0 where the vote is a draw or nobody votes."""
        votes = torch.zeros(values[0].shape, dtype=torch.float64, device=values[0].device)
        for value, weight in zip(values, self.weights, strict=True):
            ballot = value if self.majority_sign_method == "total" else value.sign()
            votes.add_(ballot, alpha=weight if self.weighted_vote else 1.0)
        return votes.sign_()

    def merge(self, values: Sequence[Tensor], signs: Tensor) -> Tensor:
        """Combines, entry by entry, only the values that have the elected sign, -1 or 1; float64."""
        elected = signs.to(values[0].dtype)
        agreeing = (torch.relu(value * elected) for value in values)
        if self.merge_func == "max":
            return self._largest(agreeing, signs).mul_(self.factor)
        total, divisor = torch.zeros_like(signs), torch.zeros_like(signs)
        for magnitude, weight in zip(agreeing, self.weights, strict=True):
            # Agreement looks at the value, not at the weighted value.
            total.add_(magnitude, alpha=weight)
            if self.merge_func == "mean":
                divisor.add_(magnitude.sign_(), alpha=abs(weight))
        if self.merge_func == "mean":
            total.div_(divisor.clamp_(min=torch.finfo(divisor.dtype).tiny))
        return total.mul_(signs).mul_(self.factor)

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
    drawn: list[tuple[Tensor, Tensor]] = []

    def combine(start: int, chunks: list[Tensor]) -> Tensor:
        nonlocal balance
        values = drop(key, start, chunks)
        signs = election.signs(values)
        undecided = 1 - signs.abs()
        if majority is None:
            balance += int(signs.sum())
        merged = election.merge(values, signs.add_(undecided, alpha=majority or 1))
        if majority is None and len(where := _contested(undecided, merged, values, election)):
            # The majority is known at the end only; until then both outcomes are kept.
            minus = torch.full((len(where),), -1.0, dtype=signs.dtype, device=signs.device)
            drawn.append((start + where, election.merge([value[where] for value in values], minus)))
        return merged

    merged = merge_chunks(tasks, key, combine, multiple)
    if balance < 0:
        for where, value in drawn:
            merged.view(-1)[where] = value.to(merged.dtype)
    return merged


def majority_sign(tasks: Sequence[Task], keys: Sequence[str], drop: Drop, election: Election) -> int:
    """The sign of the sum of all elected signs of some tensors, plus if it is zero; one read of the tensors."""
    balance = 0
    for key in keys:
        for start, stop in spans(tasks[0].shape(key).numel()):
            chunks = [task.chunk(key, start, stop) for task in tasks]
            balance += int(election.signs(drop(key, start, chunks)).sum())
    return -1 if balance < 0 else 1


def _contested(undecided: Tensor, merged: Tensor, values: Sequence[Tensor], election: Election) -> Tensor:
    """Indices of the entries without a sign for which somebody voted."""
    if min(election.weights) > 0:
        # Then somebody voted plus, and the merge with plus shows it.
        draws = undecided.mul_(merged)
    else:
        draws = undecided.mul_(torch.stack([value.abs() for value in values]).amax(0))
    return draws.nonzero().view(-1) if draws.count_nonzero() else draws.new_empty(0, dtype=torch.int64)
