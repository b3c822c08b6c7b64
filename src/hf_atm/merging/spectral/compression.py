"""Task vectors in a tenth of the space: truncated singular value decompositions, ready for safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..tensors import accumulation_dtype, check_finite, listed
from .decompositions import thin_svd


# Every stored name is one of these and the tensor's own name, so that none can be mistaken for another.
_WHOLE, _LEFT, _VALUES, _RIGHT, _FORM = "whole/", "left/", "values/", "right/", "form/"


def compress_task_vector(
    task_vector: Mapping[str, Tensor],
    ratio: float | None = None,
    rank: int | None = None,
    num_tasks: int | None = None,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    """
    Compresses a task vector to the leading singular triplets of its matrices.

    `Delta ~ U_k diag(s_k) V_k.T`, the best approximation of rank k. With `num_tasks=T` this is TSV-C
    (https://huggingface.co/papers/2412.00081), which keeps `k = floor(r / T)` of `r = min(m, n)` triplets for each of T
    tasks and restores the model of a known task with [`decompress`].

    Args:
        task_vector (`Mapping[str, Tensor]`):
            Floating-point tensors, finite. Tensors of more than two dimensions, such as kernels, are seen as matrices
            `(out, rest)`; those of fewer, and matrices whose factors would be no smaller, are stored whole.
        ratio (`float`, *optional*):
            Share of a matrix's entries to keep, in (0, 1): `k = floor(ratio m n / (m + n + 1))`, at least 1. The
            default, .1, if `rank` and `num_tasks` are not given either.
        rank (`int`, *optional*):
            The same k for all matrices, at least 1.
        num_tasks (`int`, *optional*):
            T of TSV-C, at least 1.
        dtype (`torch.dtype`, *optional*):
            Floating type in which factors and whole tensors are stored; singular values are float32 at least. Defaults
            to each tensor's own.
        exclude (`Sequence[str]`, *optional*):
            Name patterns (`fnmatch`) of tensors that are stored whole.

    Returns:
        `dict[str, Tensor]`: contiguous tensors on the CPU. `left/<name>` `(m, k)`, `values/<name>` `(k,)` and
        `right/<name>` `(n, k)`, or `whole/<name>`; `form/<name>` is empty and has the type of the tensor and, after a
        zero, its shape. Nothing else is needed to restore it, and no model's names can collide with these.

    Raises:
        `ValueError`: if more than one of `ratio`, `rank` and `num_tasks` is given, one is out of range, or a tensor is
            not floating point or not finite.

    Cost: one decomposition of order min(m, n)^3 per matrix, in float64.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import compress_task_vector, decompress

    >>> stored = compress_task_vector({"w": torch.ones(20, 30)}, rank=1)
    >>> sum(tensor.numel() for tensor in stored.values())
    51
    >>> decompress(stored)["w"].shape
    torch.Size([20, 30])
    ```
    """
    ratio = _check_budget(ratio, rank, num_tasks)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot hold a task vector; give a floating-point type.")
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of name patterns; write exclude=[{exclude!r}].")
    for key, tensor in task_vector.items():
        if not tensor.is_floating_point():
            raise ValueError(f"Tensor '{key}' is {tensor.dtype}; a task vector has floating-point tensors only.")
        check_finite(tensor, key, "the task vector")
    stored: dict[str, Tensor] = {}
    for key in sorted(task_vector):
        tensor = task_vector[key].detach()
        stored[_FORM + key] = torch.empty((0, *tensor.shape), dtype=tensor.dtype)
        kept = 0
        if tensor.ndim > 1 and not any(fnmatchcase(key, pattern) for pattern in exclude):
            kept = _kept_rank(tensor.flatten(1).shape, ratio, rank, num_tasks)
        parts = _factors(tensor.flatten(1), kept) if kept else {_WHOLE: tensor}
        for kind, part in parts.items():
            stored[kind + key] = _at_rest(kind, key, part, dtype or tensor.dtype)
    return stored


def decompress(
    compressed: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
    scaling_coefficient: float = 1.0,
) -> dict[str, Tensor]:
    """
    Restores a compressed task vector, or the model it belongs to: `theta_0 + lambda U diag(s) V.T`.

    Args:
        compressed (`Mapping[str, Tensor]`):
            What [`compress_task_vector`] gave, possibly through a file.
        base (`Mapping[str, Tensor]`, *optional*):
            The model to add the task vector to.
        scaling_coefficient (`float`, *optional*, defaults to 1.0):
            Factor lambda on the task vector.

    Returns:
        `dict[str, Tensor]`: without a base, the task vector in its original shapes and types, keys sorted. With one,
        a state dict with the keys, order and types of the base, computed one precision up and rounded once; tensors
        without a task vector are copies of the base's.

    Raises:
        `ValueError`: for names that [`compress_task_vector`] does not give, missing parts, and tensors that the base
            lacks or has in another shape.
    """
    if not math.isfinite(scaling_coefficient):
        raise ValueError(f"scaling_coefficient={scaling_coefficient} must be a finite number.")
    forms = _forms(compressed)
    if base is None:
        return {
            key: (_restore(compressed, key, form) * scaling_coefficient).to(form.dtype) for key, form in forms.items()
        }
    missing = [key for key in forms if key not in base]
    if missing:
        raise ValueError(f"The base has no tensors {listed(missing)}, which the compressed task vector changes.")
    result = {}
    for key, tensor in base.items():
        if key not in forms:
            result[key] = tensor.detach().clone()
            continue
        shape = forms[key].shape[1:]
        if tensor.shape != shape:
            raise ValueError(f"Tensor '{key}' is {tuple(tensor.shape)} in the base but {tuple(shape)} compressed.")
        update = _restore(compressed, key, forms[key]).to(tensor.device) * scaling_coefficient
        wide = torch.promote_types(accumulation_dtype(tensor.dtype), update.dtype)
        result[key] = (tensor.detach().to(wide) + update.to(wide)).to(tensor.dtype)
    return result


def compression_error(task_vector: Mapping[str, Tensor], compressed: Mapping[str, Tensor]) -> float:
    """
    Relative error of a compressed task vector over the whole model.

    Args:
        task_vector (`Mapping[str, Tensor]`):
            The task vector.
        compressed (`Mapping[str, Tensor]`):
            What [`compress_task_vector`] gave for it.

    Returns:
        `float`: norm of the difference over the norm of the task vector; 0 for a zero task vector.
    """
    lost, total = [], []
    for key, form in _forms(compressed).items():
        tensor = task_vector[key].detach().to(torch.float64)
        lost.append(float(torch.linalg.vector_norm(_restore(compressed, key, form).to(tensor) - tensor)) ** 2)
        total.append(float(torch.linalg.vector_norm(tensor)) ** 2)
    whole = math.fsum(total)
    return math.sqrt(math.fsum(lost) / whole) if whole else 0.0


def _check_budget(ratio: float | None, rank: int | None, num_tasks: int | None) -> float:
    given = {"ratio": ratio, "rank": rank, "num_tasks": num_tasks}
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"Give one of ratio, rank and num_tasks, not {' and '.join(named)}.")
    for name, value in (("rank", rank), ("num_tasks", num_tasks)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1):
        raise ValueError(f"ratio={ratio!r} must be a number between 0 and 1, the share of entries kept.")
    return 0.1 if ratio is None else float(ratio)


def _kept_rank(shape: Sequence[int], ratio: float, rank: int | None, num_tasks: int | None) -> int:
    """Number of triplets to keep of a matrix; 0 where they would take no less space than the matrix."""
    rows, columns = shape
    if rank is not None:
        kept = rank
    elif num_tasks is not None:
        kept = min(shape) // num_tasks
    else:
        kept = int(ratio * rows * columns / (rows + columns + 1))
    kept = max(1, kept)
    return kept if kept * (rows + columns + 1) < rows * columns else 0


def _factors(matrix: Tensor, kept: int) -> dict[str, Tensor]:
    return dict(zip((_LEFT, _VALUES, _RIGHT), thin_svd(matrix, kept), strict=True))


def _at_rest(kind: str, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy as files want it: on the CPU, contiguous, sharing no memory."""
    # Half types would flush small singular values to zero.
    dtype = torch.promote_types(dtype, torch.float32) if kind == _VALUES else dtype
    stored = tensor.to("cpu", dtype).clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"Tensor '{key}' overflows {dtype}; give dtype a wider type, such as torch.bfloat16.")
    return stored


def _forms(compressed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original names, sorted, with the empty tensors that hold their shapes and types."""
    kinds = (_WHOLE, _LEFT, _VALUES, _RIGHT, _FORM)
    strange = sorted(key for key in compressed if not key.startswith(kinds))
    if strange:
        raise ValueError(f"Not a compressed task vector: {listed(strange)} is none of {', '.join(kinds)}.")
    forms = {key.removeprefix(_FORM): compressed[key] for key in sorted(compressed) if key.startswith(_FORM)}
    complete = {frozenset({_WHOLE}), frozenset({_LEFT, _VALUES, _RIGHT})}
    names = sorted({key.partition("/")[2] for key in compressed})
    broken = [
        name
        for name in names
        if name not in forms or frozenset(kind for kind in kinds[:4] if kind + name in compressed) not in complete
    ]
    if broken:
        raise ValueError(f"The compressed task vector is incomplete: parts of {listed(broken)} are missing.")
    return forms


def _restore(compressed: Mapping[str, Tensor], key: str, form: Tensor) -> Tensor:
    """One tensor in its original shape, one precision above what is stored."""
    if _WHOLE + key in compressed:
        tensor = compressed[_WHOLE + key]
        return tensor.to(accumulation_dtype(tensor.dtype))
    left, values, right = (compressed[kind + key] for kind in (_LEFT, _VALUES, _RIGHT))
    wide = accumulation_dtype(left.dtype)
    return ((left.to(wide) * values.to(wide)) @ right.to(wide).T).reshape(form.shape[1:])
