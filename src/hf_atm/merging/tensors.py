"""Ground shared by all merge methods: canonical task order, precision, and checks of the inputs."""

from __future__ import annotations

import difflib
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


MAX_LISTED = 20

# The types that weights are written in.
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Entries handled at once: few enough for the cache, enough that two threads seldom wait for each other's interpreter.
CHUNK = 1 << 17


class LazyTensors(Mapping[str, Tensor]):
    """A mapping whose tensors are computed or read when asked for, and whose shapes and pieces are cheap."""

    @abstractmethod
    def shape(self, key: str) -> torch.Size:
        """Shape of a tensor, from what is known without computing it."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """Type in which a tensor is read."""

    def stored_dtype(self, key: str) -> torch.dtype:
        """Type of what the tensor is computed from, where it is read in a wider one."""
        return self.dtype(key)

    @abstractmethod
    def chunk(self, key: str, start: int, stop: int) -> Tensor:
        """The flat entries `[start, stop)` of a tensor, shape `(stop - start,)`."""

    def strided(self, key: str, start: int, step: int) -> Tensor:
        """Every `step`-th flat entry from `start` on; worth overriding where not the whole tensor need be computed."""
        return self[key].reshape(-1)[start::step]


@dataclass(frozen=True)
class Task:
    """One input of a merge: its name, its weight, its tensors, and whatever else the method was given for it."""

    name: str
    weight: float
    tensors: Mapping[str, Tensor]
    extra: Any = None

    def shape(self, key: str) -> torch.Size:
        """Shape of a tensor, without computing it."""
        return self.tensors.shape(key) if isinstance(self.tensors, LazyTensors) else self.tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Type in which `tensor` and `chunk` give a tensor: float64 for float64, else float32."""
        stored = self.tensors.dtype(key) if isinstance(self.tensors, LazyTensors) else self.tensors[key].dtype
        return result_dtype(stored)

    def product_dtype(self, key: str) -> torch.dtype:
        """Type of matrix products that need no more digits than the weights: float64 for those in float64, else float32."""
        return (
            result_dtype(self.tensors.stored_dtype(key)) if isinstance(self.tensors, LazyTensors) else self.dtype(key)
        )

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, detached, in the type of `dtype`; half types convert exactly."""
        tensor = self.tensors[key].detach()
        return tensor.to(result_dtype(tensor.dtype))

    def chunk(self, key: str, start: int, stop: int) -> Tensor:
        """The flat entries `[start, stop)` of a tensor, otherwise like `tensor`."""
        if isinstance(self.tensors, LazyTensors):
            piece = self.tensors.chunk(key, start, stop)
        else:
            piece = self.tensors[key].detach().reshape(-1)[start:stop]
        return piece.to(result_dtype(piece.dtype))

    def strided(self, key: str, start: int, step: int) -> Tensor:
        """Every `step`-th flat entry of a tensor from `start` on, otherwise like `tensor`: a sample of it."""
        if isinstance(self.tensors, LazyTensors):
            piece = self.tensors.strided(key, start, step)
        else:
            piece = self.tensors[key].detach().reshape(-1)[start::step]
        return piece.to(result_dtype(piece.dtype))


def canonical_tasks(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    extra: Sequence[Any] | None = None,
) -> list[Task]:
    """
    Sorts the inputs by name, which makes every floating-point sum independent of the order they came in.

    Tasks of weight zero are left out (they neither vote nor take up rank), unless all weights are zero.
    """
    beside = extra if extra is not None else [None] * len(names)
    tasks = [
        Task(name, float(weight), contiguous(tensors) if isinstance(tensors, dict) else tensors, more)
        for name, weight, tensors, more in zip(names, weights, task_vectors, beside, strict=True)
    ]
    tasks = sorted(tasks, key=lambda task: task.name)
    return [task for task in tasks if task.weight != 0] or tasks


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mapping, without tensors that would be copied anew for every piece that is read of them."""
    strided = {key: tensors[key] for key in tensors if not tensors[key].is_contiguous()}
    return {**tensors, **{key: tensor.contiguous() for key, tensor in strided.items()}} if strided else tensors


def sorted_keys(tasks: Sequence[Task]) -> list[str]:
    """The tensor names, in the order in which every method processes them."""
    return sorted(tasks[0].tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """One precision up: float32 for half and smaller types, float64 for float32 and float64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of a merged task vector: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(tensors: Iterable[Tensor], coefficients: Iterable[float]) -> Tensor:
    """
    Sum of `coefficient * tensor` in one accumulator, rounded once.

    Args:
        tensors (`Iterable[Tensor]`):
            Tensors of one shape; read one at a time, so a generator keeps a single one in memory.
        coefficients (`Iterable[float]`):
            As many coefficients.

    Returns:
        `Tensor`: float64 for float64 inputs, else float32; same shape and device as the first tensor.
    """
    total: Tensor | None = None
    out_dtype = torch.float32
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        tensor = tensor.detach()
        dtype = accumulation_dtype(tensor.dtype)
        out_dtype = torch.promote_types(out_dtype, result_dtype(tensor.dtype))
        if total is None:
            total = tensor.to(dtype) * coefficient
        else:
            total = total.to(torch.promote_types(total.dtype, dtype))
            total.add_(tensor.to(device=total.device, dtype=total.dtype), alpha=coefficient)
    if total is None:
        raise ValueError("A weighted sum needs at least one tensor.")
    return total.to(out_dtype)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Returns the weights as floats, ones if there are none; wrong number or non-finite values raise `ValueError`."""
    if weights is None:
        return [1.0] * count
    values = [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"Got {len(values)} weights for {count} models; give one weight per model.")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"Merge weights must be finite, got {values}.")
    return values


def check_names(names: Sequence[str], count: int) -> list[str]:
    """Returns the task names as a list; a wrong number or a repeated name raises `ValueError`."""
    if len(names) != count:
        raise ValueError(f"Got {len(names)} names for {count} models; give one name per model.")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ValueError(f"Task names must differ, but {listed(repeated)} occurs more than once.")
    return list(names)


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds no infinity and no NaN."""
    # The extremes carry both, and are found an order of magnitude faster than a mask of all entries.
    return tensor.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor.detach()))


def converted(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """
    A tensor that is taken over as it is, in its type in the result.

    Raises:
        `ValueError`: if an entry is not a number, or finite and too large for the type; infinities, as in attention
            masks, stay what they are.
    """
    result = tensor.to(dtype)
    if result.is_floating_point() and not all_finite(result):
        if bool(tensor.isnan().any()):
            raise ValueError(f"Tensor '{key}' has entries that are not a number; nothing was merged.")
        if bool((result.isinf() & tensor.isfinite()).any()):
            raise ValueError(f"Tensor '{key}' overflows {dtype}; choose a wider output type.")
    return result


def check_finite(tensor: Tensor, key: str, task: str) -> None:
    """Raises `ValueError` that names task and tensor if an entry is infinite or not a number."""
    if not all_finite(tensor):
        raise ValueError(f"Tensor '{key}' of '{task}' has entries that are not finite; nothing was merged.")


def content_names(
    mappings: Sequence[Mapping[str, Tensor]], weights: Sequence[float], keys: Iterable[str]
) -> list[str]:
    """
    Names for inputs that came without: SHA-256 of their tensors, so that they do not depend on the input order.

    Equal inputs are told apart by their weights, then by a counter. Costs one read of all tensors.
    """
    keys = sorted(keys)
    digests = []
    for mapping in mappings:
        digest = hashlib.sha256()
        for key in keys:
            tensor = mapping[key].detach()
            digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.hexdigest()[:32])
    names = [""] * len(digests)
    order = sorted(range(len(digests)), key=lambda index: (digests[index], weights[index]))
    for rank, index in enumerate(order):
        first = next(position for position, other in enumerate(order) if digests[other] == digests[index])
        names[index] = f"{digests[index]}#{rank - first}"
    return names


def listed(items: Sequence[str]) -> str:
    """Joins names for a message and shortens long lists."""
    shown = ", ".join(repr(item) for item in items[:MAX_LISTED])
    return shown if len(items) <= MAX_LISTED else f"{shown} and {len(items) - MAX_LISTED} more"


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the known one most like it, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known ones are {', '.join(known)}."
