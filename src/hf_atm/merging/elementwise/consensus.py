"""TALL masks and consensus: entries that a task, or several of them, find important in the sum of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..registry import check_merge_kwargs, register_merge_method
from ..task_vectors import check_same_keys
from ..tensors import Task, canonical_tasks, check_names, check_weights, sorted_keys
from .chunks import merge_chunks, merge_each


@register_merge_method("consensus", "consensus_ta", family="elementwise", per_tensor=True)
def consensus(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    mask_threshold: float | Sequence[float] = 0.4,
    k: int = 2,
) -> dict[str, Tensor]:
    """
    Consensus task arithmetic: the sum of the task vectors where enough tasks need it
    (https://huggingface.co/papers/2405.07813).

    With `S = sum_t w_t tau_t`, task t needs an entry if `|w_t tau_t| > mask_threshold_t * |S - w_t tau_t|`; the
    result is S where at least `k` tasks need it, zero elsewhere. The authors scale it by .3 or a value tuned on
    validation data, as task arithmetic. `k` counts as T where there are fewer tasks, so that one task stays as it is.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        mask_threshold (`float` or `Sequence[float]`, *optional*, defaults to 0.4):
            The authors' lambda, at least 0: one for all tasks, or T of them in the order of `task_vectors`; the
            larger, the fewer entries a task needs. They choose among .2, .3, ..., .6 per task on validation data.
        k (`int`, *optional*, defaults to 2):
            Number of tasks that must need an entry, at least 1; 1 also keeps what is selfish.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a sum.

    Raises:
        `ValueError`: if there are not as many thresholds as tasks.
    """
    tasks = _tasks(task_vectors, weights, names, mask_threshold)
    needed = min(k, len(tasks))

    def combine(start: int, chunks: list[Tensor]) -> Tensor:
        total, masks = _total_and_masks(tasks, chunks)
        votes = torch.stack(masks).sum(0, dtype=torch.int32)
        return total.mul_(votes >= needed)

    return merge_each(tasks, 0, False, lambda key: merge_chunks(tasks, key, combine))


@dataclass(frozen=True)
class TallMasks:
    """
    The sum of T task vectors, and for each task the entries of it that the task needs.

    Args:
        total (`dict[str, Tensor]`):
            The weighted sum, float32 or float64.
        masks (`dict[str, dict[str, Tensor]]`):
            Per task and tensor name, eight entries in a byte (uint8), the first in its highest bit.
    """

    total: dict[str, Tensor]
    masks: dict[str, dict[str, Tensor]]

    def task_vector(self, name: str) -> dict[str, Tensor]:
        """
        The task vector of one task, rebuilt as `mask * total`; added to the base it gives a model for that task.

        Args:
            name (`str`):
                A key of `masks`.

        Returns:
            `dict[str, Tensor]`: tensors of the type and shape of `total`.

        Raises:
            `KeyError`: if there is no such task; the message lists those there are.
        """
        if name not in self.masks:
            raise KeyError(f"There is no mask for task {name!r}; the tasks are {', '.join(sorted(self.masks))}.")
        packed = self.masks[name]
        return {key: total * _unpacked(packed[key], total) for key, total in self.total.items()}


def tall_masks(
    task_vectors: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    mask_threshold: float | Sequence[float] = 0.4,
) -> TallMasks:
    """
    TALL masks: T task vectors stored as their sum and one bit per entry and task
    (https://huggingface.co/papers/2405.07813).

    With `S = sum_t w_t tau_t`, the mask of task t is `|w_t tau_t| > mask_threshold_t * |S - w_t tau_t|`, and
    `theta_0 + mask_t * S` stands for its model. For a task that is known when the model is used; see [`consensus`]
    for one model of all tasks.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        names (`Sequence[str]`):
            T different task names.
        weights (`Sequence[float]`, *optional*):
            T weights, ones by default.
        mask_threshold (`float` or `Sequence[float]`, *optional*, defaults to 0.4):
            At least 0: one for all tasks, or T of them; see [`consensus`].

    Returns:
        `TallMasks`: the sum and the masks.

    Raises:
        `ValueError`: for wrong thresholds, weights or names, and keys or shapes that differ.

    Cost: one pass; 4 bytes for an entry of the sum and T / 8 for its masks.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import tall_masks

    >>> packed = tall_masks([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}], ["a", "b"])
    >>> packed.task_vector("b")["w"].tolist()
    [0.0, 2.0]
    ```
    """
    names = check_names(names, len(task_vectors))
    check_merge_kwargs("consensus", {"mask_threshold": mask_threshold})
    check_same_keys(task_vectors, names)
    tasks = _tasks(task_vectors, check_weights(weights, len(names)), names, mask_threshold)
    bits: dict[str, dict[str, list[Tensor]]] = {task.name: {} for task in tasks}
    total = {}
    for key in sorted_keys(tasks):

        def combine(start: int, chunks: list[Tensor], key: str = key) -> Tensor:
            piece, masks = _total_and_masks(tasks, chunks)
            for task, mask in zip(tasks, masks, strict=True):
                packed = np.packbits(mask.cpu().numpy())
                bits[task.name].setdefault(key, []).append(torch.from_numpy(packed))
            return piece

        total[key] = merge_chunks(tasks, key, combine)
    return TallMasks(
        total, {name: {key: torch.cat(each) for key, each in masks.items()} for name, masks in bits.items()}
    )


def _tasks(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    mask_threshold: float | Sequence[float],
) -> list[Task]:
    """The tasks in canonical order, each with its threshold beside it."""
    if isinstance(mask_threshold, Sequence):
        if len(mask_threshold) != len(names):
            raise ValueError(
                f"Got {len(mask_threshold)} values of mask_threshold for {len(names)} tasks; give one, or one per task."
            )
        return canonical_tasks(task_vectors, weights, names, list(mask_threshold))
    return canonical_tasks(task_vectors, weights, names, [mask_threshold] * len(names))


def _total_and_masks(tasks: Sequence[Task], chunks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum in float64, and per task which entries it needs."""
    values = [chunk.double() * task.weight for task, chunk in zip(tasks, chunks, strict=True)]
    total = values[0].clone()
    for value in values[1:]:
        total.add_(value)
    return total, [
        value.abs() > (total - value).abs_().mul_(task.extra) for task, value in zip(tasks, values, strict=True)
    ]


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    mask = np.unpackbits(bits.cpu().numpy(), count=like.numel())
    return torch.from_numpy(mask).to(like.device, like.dtype).view(like.shape)
