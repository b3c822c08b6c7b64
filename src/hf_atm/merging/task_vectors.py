"""The in-loop entry point: task vectors in, one merged task vector out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import MergeMethod, check_merge_kwargs, get_merge_method
from .tensors import check_finite, check_names, check_weights, content_names, listed


def merge_task_vectors(
    task_vectors: Sequence[Mapping[str, Tensor]],
    method: str = "mean",
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    scaling_coefficient: float | str = 1.0,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """
    Merges T task vectors into one.

    The result is bit-equal for any order of the inputs, in any process and for any hash seed.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings from tensor name to tensor, with the same names and shapes, floating point and finite. They are
            not changed.
        method (`str`, *optional*, defaults to `"mean"`):
            A name of [`list_merge_methods`].
        weights (`Sequence[float]`, *optional*):
            T weights, ones by default; zero and negative ones are allowed. `mean` divides by their sum; sum-like
            methods use them as they are, so ones give sums.
        names (`Sequence[str]`, *optional*):
            T different task names. They decide random masks and the order of summation. Without them the inputs are
            named by their contents, which costs one read of all tensors.
        scaling_coefficient (`float` or `str`, *optional*, defaults to 1.0):
            Factor lambda on the merged task vector. `"norm"` chooses it without data, see [`norm_scale`].
        **kwargs:
            The method's own keywords, such as `density`.

    Returns:
        `dict[str, Tensor]`: merged task vector, keys sorted, float32 (float64 for float64 inputs).

    Raises:
        `KeyError`: if the method is unknown.
        `ValueError`: before any work, for keyword, weight, name, key, shape or dtype errors and for entries that are
            not finite; the message names task and tensor.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import merge_task_vectors

    >>> merge_task_vectors([{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 1.0])}])
    {'w': tensor([2., 2.])}
    ```
    """
    task_vectors = list(task_vectors)
    kwargs, scale = resolve_scale(method, kwargs, scaling_coefficient)
    values = check_weights(weights, len(task_vectors))
    if not task_vectors:
        raise ValueError("There is nothing to merge: task_vectors is empty.")
    labels = check_names(names, len(task_vectors)) if names is not None else None
    shown = labels or [f"task vector {index}" for index in range(len(task_vectors))]
    check_same_keys(task_vectors, shown)
    for label, vector in zip(shown, task_vectors, strict=True):
        for key, tensor in vector.items():
            check_finite(tensor, key, label)
    labels = labels or content_names(task_vectors, values, task_vectors[0])
    rule = get_merge_method(method)
    merged = rule.function(task_vectors, values, labels, **kwargs)
    return _scale_merged(rule, merged, scale, task_vectors, values)


def norm_scale(task_vector_norms: Iterable[float], merged_norm: float) -> float:
    """
    The data-free scale `"norm"`: root mean square of the task vectors' norms over the norm of the merged vector.

    It gives the merged update the length of a typical single-task update; for the mean of T orthogonal task vectors
    of equal norm it is sqrt(T).

    Args:
        task_vector_norms (`Iterable[float]`):
            Euclidean norms of the task vectors over the merged tensors, non-negative.
        merged_norm (`float`):
            Norm of the merged task vector before scaling, non-negative.

    Returns:
        `float`: the scale; 1.0 if the merged norm is zero.

    Example:

    ```python
    >>> from hf_atm.merging import norm_scale

    >>> norm_scale([3.0, 3.0, 3.0, 3.0], 1.5)
    2.0
    ```
    """
    norms = list(task_vector_norms)
    if merged_norm == 0 or not norms:
        return 1.0
    return math.sqrt(math.fsum(norm * norm for norm in norms) / len(norms)) / merged_norm


def euclidean_norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors of a mapping, accumulated in float64."""
    squares = (float(torch.linalg.vector_norm(tensors[key].detach(), dtype=torch.float64)) ** 2 for key in tensors)
    return math.sqrt(math.fsum(squares))


def resolve_scale(
    method: str, kwargs: Mapping[str, Any], scaling_coefficient: float | str
) -> tuple[dict[str, Any], float | str]:
    """Checks keywords and scale, and separates the method's keywords from the scale and its alias."""
    given = dict(kwargs)
    # The default of the signature must not clash with the alias.
    if scaling_coefficient != 1.0 or "scaling_factor" not in given:
        given["scaling_coefficient"] = scaling_coefficient
    checked = check_merge_kwargs(method, given)
    return checked, checked.pop("scaling_coefficient")


def _scale_merged(
    rule: MergeMethod,
    merged: dict[str, Tensor],
    scale: float | str,
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
) -> dict[str, Tensor]:
    """Applies the method's own factor, then a number or the `"norm"` rule over the tasks of non-zero weight."""
    factor = 1.0
    if rule.rescale is not None or isinstance(scale, str):
        counted = [vector for vector, weight in zip(task_vectors, weights, strict=True) if weight != 0]
        norms, merged_norm = [euclidean_norm(vector) for vector in counted], euclidean_norm(merged)
        factor = rule.rescale(norms, merged_norm) if rule.rescale is not None else 1.0
        if isinstance(scale, str):
            factor *= norm_scale(norms, merged_norm * abs(factor))
    if not isinstance(scale, str):
        factor *= scale
    if factor == 1.0:
        return merged
    return {key: (tensor.double() * factor).to(tensor.dtype) for key, tensor in merged.items()}


def check_same_keys(task_vectors: Sequence[Mapping[str, Tensor]], labels: Sequence[str]) -> None:
    """Raises `ValueError` unless all task vectors have the same keys and shapes and are floating point."""
    first = task_vectors[0]
    odd = sorted({key for vector in task_vectors for key in set(vector) ^ set(first)})
    if odd:
        raise ValueError(f"Task vectors must have the same keys, but these are not in all of them: {listed(odd)}.")
    for label, vector in zip(labels, task_vectors, strict=True):
        for key in sorted(first):
            if vector[key].shape != first[key].shape:
                shapes = f"{tuple(first[key].shape)} in '{labels[0]}' but {tuple(vector[key].shape)} in '{label}'"
                raise ValueError(f"Task vectors must have the same shapes, but '{key}' is {shapes}.")
            if not vector[key].is_floating_point():
                raise ValueError(
                    f"Tensor '{key}' of '{label}' is {vector[key].dtype}; only floating-point tensors are merged, "
                    "leave buffers to merge_buffers."
                )
