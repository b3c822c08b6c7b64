"""Merging whole models: keys, shapes, dtypes, tied tensors, buffers and exclusions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from .buffers import is_statistic, merge_buffers
from .registry import MergeMethod, get_merge_method
from .task_vectors import euclidean_norm, norm_scale, resolve_scale
from .tensors import accumulation_dtype, check_finite, check_names, check_weights, content_names, listed
from .tying import alias_of, complete_ties, tied_groups


State = Mapping[str, Tensor]


def merge_state_dicts(
    state_dicts: Sequence[State | nn.Module],
    base: State | nn.Module | None = None,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    scaling_coefficient: float | str = 1.0,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
    strict: bool = True,
    buffers: str = "pooled",
    min_sparse_numel: int = 100,
    names: Sequence[str] | None = None,
    **method_kwargs: Any,
) -> dict[str, Tensor]:
    """
    Merges fine-tuned models of one architecture into one state dict.

    `theta = theta_0 + lambda * merge({theta_t - theta_0})`, computed tensor by tensor one precision above the inputs
    and rounded once. The result is bit-equal for any order of the models (copied tensors without a base excepted).

    Args:
        state_dicts (`Sequence[Mapping[str, Tensor] | nn.Module]`):
            T state dicts or modules. They are not changed, and the result shares no memory with them.
        base (`Mapping[str, Tensor] | nn.Module`, *optional*):
            The common starting point. Only the mean works without.
        method (`str`, *optional*, defaults to `"mean"`):
            A name of [`list_merge_methods`].
        weights (`Sequence[float]`, *optional*):
            T weights, ones by default; see [`merge_task_vectors`].
        scaling_coefficient (`float` or `str`, *optional*, defaults to 1.0):
            Factor lambda on the merged task vector, or `"norm"`; needs a base unless it is 1.
        dtype (`torch.dtype`, *optional*):
            Floating type of the result. Defaults, per tensor, to the widest type among models and base.
        exclude (`Sequence[str]`, *optional*):
            Name patterns (`fnmatch`) of tensors that are not merged; they come from `base`, or without a base from
            the first model, and may differ in shape between models or be missing in some.
        strict (`bool`, *optional*, defaults to `True`):
            Whether keys or shapes that differ are an error. With `False` such tensors are copied from the base (or
            the first model), and those the base does not have are left out; a warning names both.
        buffers (`str`, *optional*, defaults to `"pooled"`):
            BatchNorm statistics: `"pooled"` over the models, see [`merge_buffers`], or those of the `"base"`.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Methods with masks merge tensors with fewer entries by the mean; 0 masks all tensors.
        names (`Sequence[str]`, *optional*):
            T different task names, which decide random masks; by default names follow from the contents.
        **method_kwargs:
            The method's own keywords, such as `density`.

    Returns:
        `dict[str, Tensor]`: state dict with the keys of `base` (or the first model), in their order. Tensors tied in
        all inputs are merged once and are one tensor in the result. Integer and boolean buffers come from the base,
        `num_batches_tracked` is the maximum.

    Raises:
        `KeyError`: if the method is unknown.
        `ValueError`: before any merging, for wrong keywords, weights, keys or shapes, a missing base, or entries that
            are not finite.

    Cost: one pass; memory is the result plus T + 3 copies of the largest tensor. `scaling_coefficient="norm"` and
    `trim_scope="model"` hold the merged task vector as well and read the inputs up to four times more.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import merge_state_dicts

    >>> merge_state_dicts([torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)]).keys()
    dict_keys(['weight', 'bias'])
    ```
    """
    rule = get_merge_method(method)
    if "min_sparse_numel" in rule.parameters:
        method_kwargs["min_sparse_numel"] = min_sparse_numel
    method_kwargs, scale = resolve_scale(method, method_kwargs, scaling_coefficient)
    if buffers not in ("pooled", "base"):
        raise ValueError(f"buffers={buffers!r} is unknown; choose 'pooled' or 'base'.")
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of name patterns; write exclude=[{exclude!r}].")
    models = [_as_dict(item) for item in state_dicts]
    if not models:
        raise ValueError("There is nothing to merge: state_dicts is empty.")
    values = check_weights(weights, len(models))
    given = check_names(names, len(models)) if names is not None else None
    origin = _as_dict(base) if base is not None else None
    if origin is None:
        _check_base_free(rule, scale, buffers)

    inputs = models if origin is None else [*models, origin]
    complete_ties(inputs)
    reference = models[0] if origin is None else origin
    shared = _shared_keys(inputs, reference, exclude, strict)
    merged_keys, pooled_keys = _split_keys(shared, reference, buffers)
    groups = tied_groups(inputs, merged_keys)
    leaders = sorted(groups)

    labels = given or [f"model {index}" for index in range(len(models))]
    for label, state in zip([*labels, "base"], inputs, strict=False):
        for key in leaders:
            check_finite(state[key], key, label)
    if origin is not None and rule.requires_base and _any_half(models, leaders):
        warnings.warn(
            "The models are stored in half precision, which has already rounded their task vectors.", stacklevel=2
        )
    labels = given or content_names(models, values, leaders)
    if "non_matrix" in rule.parameters:
        # A tied tensor is no matrix if any of its names says so, not only the one it is merged under.
        patterns = method_kwargs.get("non_matrix", rule.parameters["non_matrix"])
        tables = [leader for leader in leaders if any(_matches(key, patterns) for key in groups[leader])]
        method_kwargs["non_matrix"] = [*patterns, *map(escape, tables)]

    out_dtypes = {key: dtype or _widest(state[key] for state in inputs) for key in leaders}
    merged = _merge_parameters(models, origin, rule, values, labels, scale, method_kwargs, out_dtypes)
    leader_of = {key: leader for leader, members in groups.items() for key in members}
    statistics = merge_buffers(
        [{key: model[key] for key in pooled_keys} for model in models],
        {key: reference[key] for key in pooled_keys},
        values,
    )
    result: dict[str, Tensor] = {}
    copies: dict[Any, Tensor] = {}
    for key, tensor in reference.items():
        if key in leader_of:
            result[key] = merged[leader_of[key]]
        elif not isinstance(tensor, Tensor):
            result[key] = tensor
        else:
            # Copied tensors keep their ties too.
            identity = alias_of(tensor) or key
            if key in statistics or identity not in copies:
                copy = statistics.get(key, tensor.detach()).clone()
                copies[identity] = copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
            result[key] = copies[identity]
    return result


class _Differences(Mapping[str, Tensor]):
    """Task vector of one model, computed tensor by tensor when read, so that it never lies in memory as a whole."""

    def __init__(self, state: State, origin: State | None, keys: Sequence[str], dtypes: Mapping[str, torch.dtype]):
        self.state, self.origin, self.keys_, self.dtypes = state, origin, keys, dtypes

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.state[key].detach()
        if self.origin is None:
            return tensor
        dtype = self.dtypes[key]
        return tensor.to(dtype) - self.origin[key].detach().to(device=tensor.device, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _merge_parameters(
    models: Sequence[State],
    origin: State | None,
    rule: MergeMethod,
    weights: Sequence[float],
    names: Sequence[str],
    scale: float | str,
    kwargs: Mapping[str, Any],
    out_dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    keys = sorted(out_dtypes)
    normalized = kwargs.get("normalize", rule.parameters.get("normalize", False))
    if not rule.requires_base and scale == 1.0 and normalized:
        # A normalised mean does not depend on the origin; leaving it out returns equal inputs exactly.
        origin = None
    inputs = models if origin is None else [*models, origin]
    dtypes = {key: accumulation_dtype(_widest(state[key] for state in inputs)) for key in keys}

    def differences(part: Sequence[str]) -> list[_Differences]:
        return [_Differences(model, origin, part, dtypes) for model in models]

    def finish(key: str, vector: Tensor, factor: float) -> Tensor:
        if origin is not None:
            vector = origin[key].detach().to(device=vector.device, dtype=dtypes[key]) + vector.to(dtypes[key]) * factor
        return vector.to(out_dtypes[key], copy=True)

    parts = [[key] for key in keys] if rule.separable(kwargs) else [keys]
    if isinstance(scale, str):
        vector = {}
        for part in parts:
            vector.update(rule.function(differences(part), weights, names, **kwargs))
        counted = [item for item, weight in zip(differences(keys), weights, strict=True) if weight != 0]
        scale = norm_scale(map(euclidean_norm, counted), euclidean_norm(vector))
        return {key: finish(key, vector.pop(key), scale) for key in keys}
    merged = {}
    for part in parts:
        for key, tensor in rule.function(differences(part), weights, names, **kwargs).items():
            merged[key] = finish(key, tensor, scale)
    return merged


def _as_dict(item: State | nn.Module) -> dict[str, Tensor]:
    return dict(item.state_dict() if isinstance(item, nn.Module) else item)


def _any_half(models: Sequence[State], keys: Sequence[str]) -> bool:
    return any(model[key].dtype.itemsize < 4 for model in models for key in keys)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _widest(tensors: Iterator[Tensor]) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _check_base_free(rule: MergeMethod, scale: float | str, buffers: str) -> None:
    if rule.requires_base:
        raise ValueError(f"Merge method '{rule.name}' works on task vectors and needs a base model; pass base=...")
    if scale != 1.0:
        raise ValueError(f"scaling_coefficient={scale!r} scales task vectors and needs a base model; pass base=...")
    if buffers == "base":
        raise ValueError("buffers='base' needs a base model; pass base=... or buffers='pooled'.")


def _shared_keys(inputs: Sequence[State], reference: State, exclude: Sequence[str], strict: bool) -> list[str]:
    """Keys that all inputs have in one shape, in the reference's order; says what happens to the others."""
    everything = list(dict.fromkeys(key for state in (reference, *inputs) for key in state))
    everything = [key for key in everything if not _matches(key, exclude)]
    shared, problems = [], []
    for key in everything:
        entries = [state[key] for state in inputs if key in state]
        shapes = list(dict.fromkeys(tuple(entry.shape) for entry in entries if isinstance(entry, Tensor)))
        if len(entries) < len(inputs):
            problems.append((key, f"{key} (missing in {len(inputs) - len(entries)} of {len(inputs)} inputs)"))
        elif len(shapes) > 1:
            problems.append((key, f"{key} ({' vs '.join(map(str, shapes))})"))
        elif shapes:
            shared.append(key)
    if problems and strict:
        raise ValueError(
            f"These tensors do not match between the models: {listed([text for _, text in problems])}; name them in "
            "exclude, or pass strict=False to copy them from the base."
        )
    if problems:
        copied = [key for key, _ in problems if key in reference]
        left_out = [key for key, _ in problems if key not in reference]
        notes = [f"copied from the base (or first model): {listed(copied)}"] if copied else []
        notes += [f"left out: {listed(left_out)}"] if left_out else []
        warnings.warn(f"Tensors that do not match between the models were {'; '.join(notes)}.", stacklevel=3)
    if not shared:
        raise ValueError("There is nothing to merge: no tensor is in all models and outside exclude.")
    return shared


def _split_keys(shared: Sequence[str], reference: State, buffers: str) -> tuple[list[str], list[str]]:
    """Keys with arithmetic, and keys of buffers that follow [`merge_buffers`]."""
    merged, pooled = [], []
    for key in shared:
        tensor = reference[key]
        if tensor.is_complex():
            raise ValueError(f"Tensor '{key}' is complex, which no merge method supports; name it in exclude.")
        if is_statistic(key, reference):
            if buffers == "pooled":
                pooled.append(key)
        elif tensor.is_floating_point():
            merged.append(key)
        else:
            pooled.append(key)
    return merged, pooled
