"""Linear merges: the weighted mean and task arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .registry import register_merge_method
from .tensors import canonical_tasks, sorted_keys, weighted_sum


# Whether a method divides by the sum of the weights unless told otherwise.
_NORMALIZES = {"mean": True, "linear": True, "task_arithmetic": False}


def is_linear(method: str) -> bool:
    """Whether a method's result is a sum of the task vectors with coefficients known beforehand."""
    return method in _NORMALIZES


def linear_coefficients(
    method: str,
    weights: Sequence[float],
    *,
    normalize: bool | None = None,
    scaling_coefficient: float = 1.0,
) -> list[float]:
    """
    Coefficients c_t of a linear method, so that its merged task vector is `sum_t c_t * tau_t`.

    A caller who sees one task at a time can add `c_t * tau_t` to a single buffer and never hold T task vectors.

    Args:
        method (`str`):
            `"mean"` (or `"linear"`) or `"task_arithmetic"`.
        weights (`Sequence[float]`):
            One weight per task; zero and negative ones are allowed.
        normalize (`bool`, *optional*):
            Whether to divide by the sum of the weights. Defaults to `True` for the mean and `False` for task
            arithmetic.
        scaling_coefficient (`float`, *optional*, defaults to 1.0):
            Factor lambda on all coefficients. `"norm"` needs the merged vector and is not available here.

    Returns:
        `list[float]`: one coefficient per task, in the order of `weights`.

    Raises:
        `ValueError`: if the method is not linear, or the weights sum to zero and are to be normalised.

    Example:

    ```python
    >>> from hf_atm.merging import linear_coefficients

    >>> linear_coefficients("mean", [3.0, 1.0])
    [0.75, 0.25]
    ```
    """
    if not is_linear(method):
        raise ValueError(f"'{method}' is not a linear merge method; the linear ones are {', '.join(_NORMALIZES)}.")
    if isinstance(scaling_coefficient, str):
        raise ValueError(f"scaling_coefficient={scaling_coefficient!r} needs the merged vector; give a number here.")
    divisor = 1.0
    if _NORMALIZES[method] if normalize is None else normalize:
        # fsum is exact, hence independent of the order of the tasks.
        divisor = math.fsum(weights)
        if abs(divisor) <= 1e-12 * math.fsum(abs(weight) for weight in weights):
            raise ValueError(
                f"The merge weights {list(weights)} sum to zero, so that there is no mean; change them, or use a method "
                "that sums, such as task_arithmetic."
            )
    return [scaling_coefficient * (weight / divisor) for weight in weights]


@register_merge_method("mean", "linear", family="linear", requires_base=False, per_tensor=True)
def mean(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    normalize: bool = True,
) -> dict[str, Tensor]:
    """
    Weighted mean, `sum_t w_t tau_t / sum_t w_t`.

    With equal weights and an outer step of one this is federated averaging, and the merge of ATM
    (https://huggingface.co/papers/2411.03055). The only method here that also works on plain parameters.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide by the sum of the weights.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean.

    Raises:
        `ValueError`: if the weights sum to zero and `normalize=True`.
    """
    return _combine("mean", task_vectors, weights, names, normalize)


@register_merge_method("task_arithmetic", family="linear", per_tensor=True)
def task_arithmetic(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    normalize: bool = False,
) -> dict[str, Tensor]:
    """
    Task arithmetic, `sum_t w_t tau_t` (https://huggingface.co/papers/2212.04089).

    The usual scale for eight tasks is `scaling_coefficient=0.3`; `"norm"` needs no data. The entry points leave the
    scale at 1.0 unless it is given.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether to divide by the sum of the weights, which turns the rule into the mean.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a sum.

    Raises:
        `ValueError`: if the weights sum to zero and `normalize=True`.
    """
    return _combine("task_arithmetic", task_vectors, weights, names, normalize)


def _combine(
    method: str,
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    normalize: bool,
) -> dict[str, Tensor]:
    tasks = canonical_tasks(task_vectors, weights, names)
    coefficients = linear_coefficients(method, [task.weight for task in tasks], normalize=normalize)
    return {key: weighted_sum((task.tensors[key] for task in tasks), coefficients) for key in sorted_keys(tasks)}
