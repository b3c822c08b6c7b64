"""PCB: parameters compete within each task and balance between tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import get_merge_method, register_merge_method
from ..tensors import canonical_tasks
from .chunks import merge_chunks, merge_each, split_small
from .selection import Numbers
from .trimming import kept_count, rank_entries


class _Range(NamedTuple):
    """Two numbers between which others are clipped and which become 0 and 1."""

    low: float
    high: float

    def scaled(self, values: Tensor) -> Tensor:
        """Min-max scaling; where the range is a point, ones from there on, but nothing counts that is not positive."""
        if self.high > self.low:
            return values.clamp(self.low, self.high).sub_(self.low).div_(self.high - self.low)
        return ((values >= self.high) & (values > 0)).double()


class PcbContext(NamedTuple):
    """What PCB must know of the whole model, per task: the range of magnitudes and that of scores which count."""

    magnitudes: list[_Range]
    scores: list[_Range]


def prepare_pcb(
    task_vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], names: Sequence[str], **kwargs: Any
) -> PcbContext | None:
    """The ranges of magnitudes and scores over the whole model, exact, in two reads of it."""
    options = {**get_merge_method("pcb").parameters, **kwargs}
    tasks = canonical_tasks(task_vectors, weights, names)
    keys, _ = split_small(tasks, 0)
    if not keys:
        return None
    total = sum(tasks[0].shape(key).numel() for key in keys)
    tail = kept_count(options["clip_tails"], total)

    def magnitudes(pieces: list[Tensor]) -> list[Numbers]:
        return [piece.abs().double().cpu().numpy() for piece in pieces for _ in range(2)]

    found = rank_entries(tasks, keys, magnitudes, [total - tail, tail + 1] * len(tasks))
    clipped = [_Range(low.value, high.value) for low, high in zip(found[::2], found[1::2], strict=True)]

    def scores(pieces: list[Tensor]) -> list[Numbers]:
        return [score.cpu().numpy() for score in _scores(pieces, clipped) for _ in range(2)]

    kept = total - kept_count(1 - options["density"], total)
    found = rank_entries(tasks, keys, scores, [max(1, kept), 1] * len(tasks))
    return PcbContext(
        clipped, [_Range(low.value, high.value) for low, high in zip(found[::2], found[1::2], strict=True)]
    )


@register_merge_method("pcb", family="elementwise", per_tensor=True, prepare=prepare_pcb)
def pcb(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float = 0.1,
    clip_tails: float = 1e-4,
    context: PcbContext | None = None,
) -> dict[str, Tensor]:
    """
    PCB-Merging: entries weighted by how large they are and how well they agree
    (https://huggingface.co/papers/2410.02396).

    Per task, with all entries of the model ranked together: magnitudes are clipped at both tails and scaled to [0, 1]
    (nu); scores are `s_t = exp(T * nu(|tau_t|)^2) * tanh(tau_t * sum_i tau_i)`; coefficients `c_t` are 0 up to the
    score's quantile `1 - density` and rise linearly to 1 at the largest score. The result is
    `sum_t w_t c_t tau_t / max(sum_t |w_t| c_t, 1e-12)` with the clipped `tau_t`. The scores do not depend on the
    weights.

    This is the authors' code, where the paper prints a softmax. It clips at least one entry from above; here
    `floor(clip_tails * n)` entries lie beyond each tail. If all scores that count are equal, positive ones get
    coefficient 1.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights of the values; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        density (`float`, *optional*, defaults to 0.1):
            Fraction kept, in (0, 1]; the authors use .05 to .1, and 1.2 as `scaling_coefficient`.
        clip_tails (`float`, *optional*, defaults to 1e-4):
            Share of magnitudes clipped at either end, in [0, 0.5).

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean.

    Cost: three reads of the task vectors; exponentials in float64 twice.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    known = context or prepare_pcb(task_vectors, weights, names, density=density, clip_tails=clip_tails)

    def combine(start: int, chunks: list[Tensor]) -> Tensor:
        assert known is not None
        total = torch.zeros(chunks[0].shape, dtype=torch.float64, device=chunks[0].device)
        divisor = torch.zeros_like(total)
        scores = _scores(chunks, known.magnitudes)
        for task, chunk, score, clipped, counted in zip(tasks, chunks, scores, *known, strict=True):
            coefficient = counted.scaled(score)
            value = chunk.double().abs().clamp_(*clipped).mul_(chunk.sign())
            total.addcmul_(coefficient, value, value=task.weight)
            divisor.add_(coefficient, alpha=abs(task.weight))
        return total.div_(divisor.clamp_(min=1e-12))

    return merge_each(tasks, 0, False, lambda key: merge_chunks(tasks, key, combine))


def _scores(chunks: Sequence[Tensor], clipped: Sequence[_Range]) -> list[Tensor]:
    """How well each entry of each task competes, float64."""
    values = [chunk.double() for chunk in chunks]
    total = values[0].clone()
    for value in values[1:]:
        total.add_(value)
    return [
        extent.scaled(value.abs()).square_().mul_(len(values)).exp_().mul_((value * total).tanh_())
        for value, extent in zip(values, clipped, strict=True)
    ]
