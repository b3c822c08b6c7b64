"""Geometric merges: slerp, the Karcher mean and Model Stock. Each reads nothing but the inner products of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .elementwise.chunks import plain_sum
from .linear import linear_coefficients
from .registry import register_merge_method
from .shares import shares
from .tensors import CHUNK, Task, canonical_tasks, sorted_keys


# Beyond this cosine the great circle is a straight line, or (antipodes) not unique.
_PARALLEL = 0.9995

# A norm this far below the largest is rounding noise and has no direction.
_NORM_FLOOR = 1e-7

Rule = Callable[[Tensor], Sequence[float]]


def inner_products(tasks: Sequence[Task], key: str) -> Tensor:
    """
    Inner products of one tensor over tasks.

    Args:
        tasks (`Sequence[Task]`):
            T tasks.
        key (`str`):
            Name of the tensor.

    Returns:
        `Tensor`: `(T, T)`, float64, on the CPU. Read in chunks, so that memory is a few times T MiB for any tensor.
    """
    total = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    size = tasks[0].shape(key).numel()
    for start in range(0, size, CHUNK):
        rows = torch.stack([task.chunk(key, start, min(start + CHUNK, size)).double() for task in tasks])
        total += (rows @ rows.T).cpu()
    return total


def cosines(gram: Tensor) -> Tensor:
    """Cosines `(T, T)` from inner products; 0 beside vectors that are zero but for rounding."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    known = norms > _NORM_FLOOR * norms.max()
    units = torch.where(known, norms, 1.0)
    return torch.where(known[:, None] & known[None, :], gram / (units[:, None] * units[None, :]), 0.0).clamp(-1, 1)


def _two_models(_vectors: Any, _weights: Any, names: Sequence[str], **_kwargs: Any) -> None:
    if len(names) != 2:
        raise ValueError(f"Merge method 'slerp' goes from one model to another and got {len(names)}; use 'karcher'.")


@register_merge_method("slerp", family="geometric", requires_base=False, per_tensor=True, prepare=_two_models)
def slerp(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    t: float | None = None,
) -> dict[str, Tensor]:
    """
    Spherical interpolation of two models, tensor by tensor.

    `(sin((1 - t) W) a + sin(t W) b) / sin W` with `W = arccos(cos(a, b))` over the flattened tensor; the straight line
    `(1 - t) a + t b` where abs cos > 0.9995, which includes opposite tensors and tensors of one entry, and where a
    tensor is zero. From checkpoints and state dicts it takes parameters, with or without a base; in the ATM loop it is
    given task vectors and turns those.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            Two mappings a, b with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            Two weights. Without `t` they place the result: `t = w_b / (w_a + w_b)`. With `t` they must be equal.
        names (`Sequence[str]`):
            Two different task names.
        t (`float`, *optional*):
            Place in [0, 1] on the way, in the order of the inputs: 0 gives the first model, 1 the second. Exchanged
            inputs with `1 - t` give the same result.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: between those of the inputs.

    Raises:
        `ValueError`: if there are not two models, if weights are negative or both zero, or if `t` meets unequal weights.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import merge_state_dicts

    >>> merge_state_dicts([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}], method="slerp", t=0.5)
    {'w': tensor([0.7071, 0.7071])}
    ```
    """
    _two_models(task_vectors, weights, names)
    if t is None:
        places = shares("slerp", weights)
    elif weights[0] == weights[1]:
        places = [1 - t, t]
    else:
        raise ValueError(f"Merge method 'slerp' got t={t} and the weights {list(weights)}; give one or the other.")
    # All weights equal, so that neither end is left out.
    tasks = canonical_tasks(task_vectors, [1.0, 1.0], names, places)
    return _combine(tasks, lambda gram: _slerp_coefficients(gram, [task.extra for task in tasks]))


def _slerp_coefficients(gram: Tensor, places: Sequence[float]) -> Sequence[float]:
    cosine = cosines(gram)[0, 1]
    if abs(cosine) > _PARALLEL or not bool(gram.diagonal().all()):
        return places
    angle = torch.arccos(cosine)
    return [float(torch.sin(place * angle) / torch.sin(angle)) for place in places]


@register_merge_method("karcher", family="geometric", requires_base=False, per_tensor=True)
def karcher(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> dict[str, Tensor]:
    """
    Karcher (Riemannian) mean of the models' directions on the sphere, tensor by tensor; slerp for any number of models.

    From the normalised mean of the unit tensors `u_t` on, `x <- exp_x(sum_t p_t log_x(u_t))` with `p = w / sum(w)`; the
    result is `sum_t p_t norm(theta_t)` long. The points stay in the span of the inputs, so the iteration runs on T
    coefficients. Where the mean is not unique, as for opposite tensors, it is the weighted mean of the tensors; zero
    tensors count for the length alone. From checkpoints and state dicts it takes parameters, with or without a base; in
    the ATM loop it is given task vectors and averages those.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T non-negative weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        max_iter (`int`, *optional*, defaults to 10):
            Most iterations, at least 1.
        tol (`float`, *optional*, defaults to 1e-5):
            Length of a step, in radians, that ends the iteration; positive.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: that of the inputs.

    Raises:
        `ValueError`: if a weight is negative, or all are zero.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    parts = torch.tensor(shares("karcher", [task.weight for task in tasks]), dtype=torch.float64)
    return _combine(tasks, lambda gram: _karcher_coefficients(gram, parts, max_iter, tol).tolist())


def _karcher_coefficients(gram: Tensor, parts: Tensor, max_iter: int, tol: float) -> Tensor:
    norms = gram.diagonal().clamp(min=0).sqrt()
    pointing = norms > 0
    if len(parts) == 1 or not bool(pointing.any()):
        return parts
    units = torch.where(pointing, norms, 1.0)
    overlap = gram / (units[:, None] * units[None, :])
    pull = torch.where(pointing, parts, 0.0) / parts[pointing].sum()
    # Coefficients of the present point over the unit tensors.
    point, length = pull, float((pull @ overlap @ pull).clamp(min=0).sqrt())
    if length < tol:
        return parts
    for _ in range(max_iter):
        point = point / (point @ overlap @ point).sqrt()
        cosine = (overlap @ point).clamp(-1, 1)
        if bool((cosine[pointing] < -_PARALLEL).any()):
            return parts
        angle = torch.arccos(cosine)
        # The logarithm's factor, angle / sin(angle), is 1 in the limit of no angle.
        factor = pull / torch.where(angle > 0, torch.sinc(angle / torch.pi), 1.0)
        step = factor - (factor @ cosine) * point
        length = float((step @ overlap @ step).clamp(min=0).sqrt())
        if length < tol:
            break
        point = math.cos(length) * point + (math.sin(length) / length) * step
    point = point / (point @ overlap @ point).sqrt()
    return (parts @ norms) * point / units


@register_merge_method("model_stock", family="geometric", per_tensor=True)
def model_stock(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """
    Model Stock: the mean, pulled towards the base by how much the tasks disagree
    (https://huggingface.co/papers/2403.19522).

    Per tensor, with c the mean cosine over all pairs of task vectors, clamped to [0, 1], the result is `t * mean_t
    tau_t` where `t = T c / (1 + (T - 1) c)`: copies give t = 1, orthogonal tasks give the base. Deviations: the cosine
    beside a zero task vector is 0, zero being relative (norm below 1e-7 of the largest), so that tiny task vectors are
    merged like others; weights enter the mean, not the cosine.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights of the mean; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: at most that of a mean.

    Raises:
        `ValueError`: if the weights sum to zero.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    mean = linear_coefficients("mean", [task.weight for task in tasks])

    def coefficients(gram: Tensor) -> list[float]:
        ratio = _stock_ratio(cosines(gram))
        return [ratio * share for share in mean]

    return _combine(tasks, coefficients)


def _stock_ratio(cosine: Tensor) -> float:
    count = len(cosine)
    if count == 1:
        return 1.0
    pairs = torch.triu_indices(count, count, offset=1)
    agreement = float(cosine[pairs[0], pairs[1]].mean().clamp(0, 1))
    return count * agreement / (1 + (count - 1) * agreement)


def _combine(tasks: Sequence[Task], coefficients: Rule) -> dict[str, Tensor]:
    return {key: plain_sum(tasks, key, coefficients(inner_products(tasks, key))) for key in sorted_keys(tasks)}
