"""Singular value calibration of a merged task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import transposed_keys
from ..registry import _RANGES
from ..spectral.decompositions import thin_svd
from ..spectral.matrices import NON_MATRIX, TaskMatrices, is_matrix, whole
from ..tensors import canonical_tasks
from .registry import is_finite, register_post_processor


# Methods that have set the tasks apart already: nothing that they give is counted more than once.
_DECORRELATED = ("tsv_m", "wudi", "swudi")


@dataclass(frozen=True)
class Calibration:
    """The floor of the scores, and the matrices stored input side first."""

    alpha: float
    transposed: frozenset[str]


def prepare_svc(
    keys: Sequence[str],
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    method: str,
    *,
    alpha: float | None = None,
    transposed: Sequence[str] | None = None,
    **_kwargs: Any,
) -> Calibration:
    """The floor, by default 1/T or, for methods that decorrelate the tasks themselves, 1; and the layout."""
    tasks = canonical_tasks(task_vectors, weights, names)
    if alpha is None:
        alpha = 1.0 if method in _DECORRELATED else 1 / len(tasks)
    return Calibration(alpha, transposed_keys({key: tasks[0].shape(key) for key in keys}, transposed))


@register_post_processor(
    "svc",
    prepare=prepare_svc,
    ranges={
        "alpha": ("a positive number, or None", lambda v: v is None or (is_finite(v) and v > 0)),
        "non_matrix": _RANGES["non_matrix"],
        "transposed": _RANGES["transposed"],
    },
)
def svc(
    merged: Mapping[str, Tensor],
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    alpha: float | None = None,
    non_matrix: Sequence[str] = NON_MATRIX,
    transposed: Sequence[str] | None = None,
    context: Calibration | None = None,
) -> dict[str, Tensor]:
    """
    SVC: shrinks the singular values that several tasks have contributed to (https://huggingface.co/papers/2602.05536).

    For a merged matrix `M = U diag(s) V.T` (rows for outputs) and each output direction u_i, task t responds with `a_t
    = u_i.T w_t Delta_t`, and `c_t = <u_i.T M, a_t> / |a_t|**2` says how much of M is in that response. Then `s_i <- s_i
    * T / sum_t max(alpha, c_t)`: T copies of one task give that task back, whatever the scale of their merge. Tasks
    that do not respond at all are not counted.

    Args:
        merged (`Mapping[str, Tensor]`):
            Merged task vector, before any scale.
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            The T task vectors it was merged from, with at least these tensors.
        weights (`Sequence[float]`):
            Their T weights; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        alpha (`float`, *optional*):
            Floor of the scores, positive; the smaller, the more a direction may grow. Defaults to 1/T, and to 1 after
            TSV-M and WUDI, whose directions are decorrelated already.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of 2-D tensors that are left as they are, as all tensors that are not 2-D are. Defaults to
            embeddings, language-model heads and position biases.
        transposed (`Sequence[str]`, *optional*):
            Name patterns of the matrices stored `(in, out)`, as GPT-2's Conv1D. By default they are recognised by the
            shapes of their biases.

    Returns:
        `dict[str, Tensor]`: the same tensors, in the same types. Scale: like one task vector.

    Cost: one decomposition of order min(m, n)^3 and T products of order m n min(m, n) per matrix, in float64.
    """
    if context is None:
        context = prepare_svc(
            list(merged), task_vectors, weights, names, method="", alpha=alpha, transposed=transposed
        )
    tasks = canonical_tasks(task_vectors, weights, names)
    result = dict(merged)
    for key, tensor in merged.items():
        if is_matrix(key, tensor.ndim, non_matrix):
            matrices = TaskMatrices(tasks, [whole(key, tensor.shape)])
            turned = key in context.transposed
            matrix = tensor.detach().to(torch.float64)
            calibrated = _calibrate(matrix.T if turned else matrix, matrices, turned, context.alpha)
            result[key] = (calibrated.T.contiguous() if turned else calibrated).to(tensor.dtype)
    return result


def _calibrate(merged: Tensor, matrices: TaskMatrices, turned: bool, alpha: float) -> Tensor:
    left = thin_svd(merged)[0]
    response = left.T @ merged
    scores, counted = torch.zeros(len(response)).to(merged), torch.zeros(len(response)).to(merged)
    for matrix in matrices:
        own = left.T @ (matrix.T if turned else matrix)
        squares = own.square().sum(dim=1)
        responds = squares > 0
        shares = (response * own).sum(dim=1) / torch.where(responds, squares, 1.0)
        scores += torch.where(responds, shares.clamp(min=alpha), 0.0)
        counted += responds
    factors = torch.where(counted > 0, counted / torch.where(counted > 0, scores, 1.0), 1.0)
    return merged + left @ ((factors - 1)[:, None] * response)
