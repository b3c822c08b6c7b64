"""Geometry and interference of task vectors: one pass over their tensors, a few of them in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..geometry import cosines, gram_matrix
from ..merging.plan import matches
from ..merging.spectral.decompositions import thin_svd
from ..merging.spectral.matrices import NON_MATRIX
from ..merging.tensors import listed
from .interference import (
    dominant_basis,
    effective_rank,
    leading_factors,
    singular_task_interference,
    subspace_alignment,
)
from .signs import SignCounts, count_signs


LEVELS = ("cheap", "full")


@dataclass
class LayerDiagnosis:
    """One tensor of the task vectors.

    Attributes:
        shape: its dimensions.
        norms: Frobenius norm per task.
        cosine: mean cosine over the pairs of tasks; 1 for a single task.
        sign_overlap, sign_conflict: shares of entries, see [`count_signs`]; `None` under `"cheap"`, as all that follows.
        interference: singular task interference; `None` for what is no matrix, as all that follows.
        alignment: per task, share of its norm within the subspace that the merged update spans.
        effective_rank: that of the merged update.
    """

    shape: list[int]
    norms: dict[str, float]
    cosine: float
    sign_overlap: float | None = None
    sign_conflict: float | None = None
    interference: float | None = None
    alignment: dict[str, float] | None = None
    effective_rank: float | None = None


@dataclass
class Diagnosis:
    """Task vectors as a whole, and tensor by tensor.

    Attributes:
        tasks: names, sorted.
        norms: L2 norm per task.
        norm_dispersion: largest norm over smallest; `None` when a task vector is zero.
        cosines: by task and task.
        sign_overlap, sign_conflict: shares of all entries.
        interference, effective_rank: means over matrices.
        alignment: per task, over all matrices, as a share of their norm.
        layers: by tensor name.
    """

    tasks: list[str]
    norms: dict[str, float]
    norm_dispersion: float | None
    cosines: dict[str, dict[str, float]]
    sign_overlap: float | None = None
    sign_conflict: float | None = None
    interference: float | None = None
    alignment: dict[str, float] | None = None
    effective_rank: float | None = None
    layers: dict[str, LayerDiagnosis] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


def diagnose(
    task_vectors: Mapping[str, Mapping[str, Tensor]],
    merged: Mapping[str, Tensor] | None = None,
    level: str = "full",
    density: float = 0.2,
    exclude: Sequence[str] = NON_MATRIX,
    report: Callable[[str], None] = lambda name: None,
    threads: int = 1,
) -> Diagnosis:
    """
    Norms, cosines, sign conflicts, singular task interference, subspace alignment and effective rank.

    Every tensor is read once per task and forgotten before the next, so task vectors may be lazy mappings over
    checkpoints. Inner products are float64, singular vectors too.

    Args:
        task_vectors (`Mapping[str, Mapping[str, Tensor]]`):
            By task, tensors by name, the same names and shapes, floating point and finite.
        merged (`Mapping[str, Tensor]`, *optional*):
            The merged update, of the same names; the sum of the task vectors by default. Its scale is of no account.
        level (`str`, *optional*, defaults to `"full"`):
            `"cheap"` leaves signs and singular vectors out.
        density (`float`, *optional*, defaults to 0.2):
            Share of each tensor's largest entries among which signs are compared.
        exclude (`Sequence[str]`, *optional*):
            Name patterns of tensors that are no matrices to their model, such as embeddings: no singular vectors.
        report (`Callable[[str], None]`, *optional*):
            Is told each tensor's name once it is done.
        threads (`int`, *optional*, defaults to 1):
            Tensors looked at at the same time, each on one core.

    Returns:
        [`Diagnosis`]

    Raises:
        `ValueError`: for no task, an unknown level, or names, shapes or entries that do not fit.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}.")
    if not task_vectors:
        raise ValueError("There is nothing to diagnose: task_vectors is empty.")
    tasks = sorted(task_vectors)
    _check_names(task_vectors, tasks)

    def diagnose_tensor(name: str) -> _Part:
        part = _diagnose_tensor(name, tasks, task_vectors, merged, level, density, exclude)
        report(name)
        return part

    names = sorted(task_vectors[tasks[0]])
    if threads > 1:
        with (
            threadpool_limits(limits=1),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            parts = list(pool.map(diagnose_tensor, names))
    else:
        parts = [diagnose_tensor(name) for name in names]
    return _summarize(tasks, dict(zip(names, parts, strict=True)), level)


class _Part(NamedTuple):
    """One tensor: its inner products, signs, figures, and each task's squared norm within the merged update's space."""

    products: Tensor
    signs: SignCounts
    layer: LayerDiagnosis
    inside: Tensor | None


def _diagnose_tensor(
    name: str,
    tasks: Sequence[str],
    task_vectors: Mapping[str, Mapping[str, Tensor]],
    merged: Mapping[str, Tensor] | None,
    level: str,
    density: float,
    exclude: Sequence[str],
) -> _Part:
    tensors = [task_vectors[task][name].detach() for task in tasks]
    _check_shapes(name, tasks, tensors)
    products = gram_matrix([{name: tensor} for tensor in tensors])
    squares = products.diagonal()
    _check_finite(name, tasks, squares.tolist())
    norms = _by_task(tasks, squares.clamp_min(0).sqrt())
    layer = LayerDiagnosis(shape=list(tensors[0].shape), norms=norms, cosine=_mean_cosine(products))
    if level == "cheap":
        return _Part(products, SignCounts(), layer, None)
    signs = count_signs(tensors, density)
    layer.sign_overlap, layer.sign_conflict = signs.overlap, signs.conflict
    if tensors[0].ndim < 2 or not tensors[0].numel() or matches(name, exclude):
        return _Part(products, signs, layer, None)
    total = torch.stack([tensor.double() for tensor in tensors]).sum(0) if merged is None else merged[name].detach()
    shares = _diagnose_matrix(layer, tasks, [tensor.flatten(1) for tensor in tensors], total.flatten(1))
    return _Part(products, signs, layer, shares.square() * squares)


def _summarize(tasks: Sequence[str], parts: Mapping[str, _Part], level: str) -> Diagnosis:
    gram = torch.stack([part.products for part in parts.values()]).sum(0)
    norms = gram.diagonal().clamp_min(0).sqrt()
    smallest = float(norms.min())
    result = Diagnosis(
        tasks=list(tasks),
        norms=_by_task(tasks, norms),
        norm_dispersion=float(norms.max()) / smallest if smallest else None,
        cosines={a: _by_task(tasks, row) for a, row in zip(tasks, cosines(gram), strict=True)},
        layers={name: part.layer for name, part in parts.items()},
    )
    if level == "full":
        signs = sum((part.signs for part in parts.values()), SignCounts())
        result.sign_overlap, result.sign_conflict = signs.overlap, signs.conflict
    matrices = [part for part in parts.values() if part.inside is not None]
    if matrices:
        result.interference = sum(part.layer.interference or 0.0 for part in matrices) / len(matrices)
        result.effective_rank = sum(part.layer.effective_rank or 0.0 for part in matrices) / len(matrices)
        inside = torch.stack([part.inside for part in matrices if part.inside is not None]).sum(0)
        whole = torch.stack([part.products.diagonal() for part in matrices]).sum(0)
        result.alignment = _by_task(tasks, (inside / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt())
    return result


def _diagnose_matrix(layer: LayerDiagnosis, tasks: Sequence[str], matrices: Sequence[Tensor], total: Tensor) -> Tensor:
    layer.interference = singular_task_interference(leading_factors(matrices))
    whole = thin_svd(total)
    layer.effective_rank = effective_rank(whole[1])
    shares = subspace_alignment(matrices, dominant_basis(whole))
    layer.alignment = dict(zip(tasks, shares, strict=True))
    return torch.tensor(shares, dtype=torch.float64)


def _by_task(tasks: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(tasks, values.tolist(), strict=True))


def _mean_cosine(gram: Tensor) -> float:
    count = len(gram)
    if count == 1:
        return 1.0
    return float(cosines(gram).triu(1).sum()) / (count * (count - 1) / 2)


def _check_names(task_vectors: Mapping[str, Mapping[str, Tensor]], tasks: Sequence[str]) -> None:
    names = set(task_vectors[tasks[0]])
    for task in tasks[1:]:
        other = sorted(names.symmetric_difference(task_vectors[task]))
        if other:
            raise ValueError(
                f"Task vectors {tasks[0]!r} and {task!r} differ in the tensors they have: {listed(other)}."
            )


def _check_shapes(name: str, tasks: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for task, tensor in zip(tasks, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"Tensor {name!r} has shape {list(tensors[0].shape)} in task vector {tasks[0]!r} and "
                f"{list(tensor.shape)} in {task!r}; only models of one architecture can be compared."
            )


def _check_finite(name: str, tasks: Sequence[str], squares: Sequence[float]) -> None:
    for task, square in zip(tasks, squares, strict=True):
        if not math.isfinite(square):
            raise ValueError(f"Tensor {name!r} of task vector {task!r} holds NaN or infinity.")
