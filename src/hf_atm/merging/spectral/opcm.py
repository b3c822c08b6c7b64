"""OPCM: a merge that takes the tasks in one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from ..registry import register_merge_method
from ..tensors import Task
from .decompositions import thin_svd
from .fused import qkv_groups
from .matrices import NON_MATRIX, TaskMatrices, merge_matrices


def mean_norm_factor(task_vector_norms: Sequence[float], merged_norm: float) -> float:
    """
    The factor that gives a merged task vector the mean length of the tasks' ones.

    Args:
        task_vector_norms (`Sequence[float]`):
            Euclidean norms of T task vectors over the whole model.
        merged_norm (`float`):
            Norm of the merged task vector over the same tensors.

    Returns:
        `float`: the factor; 1.0 if the merged norm is zero.

    Example:

    ```python
    >>> from hf_atm.merging.spectral.opcm import mean_norm_factor

    >>> mean_norm_factor([2.0, 4.0], 6.0)
    0.5
    ```
    """
    return math.fsum(task_vector_norms) / len(task_vector_norms) / merged_norm if merged_norm else 1.0


@register_merge_method("opcm", family="spectral", per_tensor=True, group=qkv_groups, rescale=mean_norm_factor)
def opcm(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    alpha: float = 0.5,
    non_matrix: Sequence[str] = NON_MATRIX,
    fuse_qkv: bool | None = None,
    flatten_conv: bool = False,
) -> dict[str, Tensor]:
    """
    OPCM: tasks merged in sequence, each without what would disturb the ones before
    (https://huggingface.co/papers/2501.09522).

    The only method that depends on the order of the inputs: that of the sequence. With `M_1 = w_1 Delta_1` and
    `M_{t-1} = U diag(s) V.T`, task t gives `P = U.T w_t Delta_t V`; the leading `k x k` block and the diagonal of P are
    set to zero, k being the number of leading directions whose share of `sum(s)` does not exceed `alpha`; `M_t =
    M_{t-1} + U P V.T`. The paper divides each sum by the factor that gives the merged model the mean norm of the task
    vectors so far; directions and shares do not depend on it, so that only the last of these factors is applied, by
    the entry points, to the whole model ([`mean_norm_factor`]). Deviation: the diagonal ends at the numerical rank of
    M, since null vectors are arbitrary.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point, in the order of the sequence.
        weights (`Sequence[float]`):
            T factors on the task vectors; not normalised. A task of weight zero takes no part.
        names (`Sequence[str]`):
            T task names; they play no role here.
        alpha (`float`, *optional*, defaults to 0.5):
            Share of the spectrum that is closed to later tasks, in [0, 1]; 0 closes the diagonal alone.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of 2-D tensors that take the sum, as all tensors that are not 2-D do. Defaults to
            embeddings, language-model heads and position biases.
        fuse_qkv (`bool`, *optional*):
            Queries, keys and values as stored (`None`), stacked (`True`) or apart (`False`), see [`iso_c`].
        flatten_conv (`bool`, *optional*, defaults to `False`):
            Whether 4-D kernels are merged as matrices `(out, in * height * width)` instead of taking the sum.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a *sum* here; like one
        task vector from the entry points.

    Cost: T - 1 decompositions of order min(m, n)^3 per matrix, in float64.
    """
    sequence = [
        Task(name, float(weight), vector) for name, weight, vector in zip(names, weights, task_vectors, strict=True)
    ]
    counted = [task for task in sequence if task.weight != 0] or sequence
    rule = partial(_project_in_turn, alpha=alpha)
    return merge_matrices(counted, rule, non_matrix, fuse_qkv, flatten_conv, others="task_arithmetic")


def _project_in_turn(matrices: TaskMatrices, alpha: float) -> Tensor:
    total: Tensor | None = None
    for matrix in matrices:
        total = matrix if total is None else total + _without_overlap(matrix, total, alpha)
    assert total is not None
    return total.to(matrices.dtype)


def _without_overlap(matrix: Tensor, total: Tensor, alpha: float) -> Tensor:
    left, values, right = thin_svd(total)
    shares = values.cumsum(0) / values.sum()
    # The last share is one but for rounding.
    closed = len(values) if alpha == 1 else int((shares <= alpha).sum())
    seen = left.T @ matrix
    overlap = (seen * right.T).sum(dim=1, keepdim=True) * right.T
    overlap[:closed] = (seen[:closed] @ right[:, :closed]) @ right[:, :closed].T
    return matrix - left @ overlap
