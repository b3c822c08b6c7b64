"""Merging whole models: keys, shapes, dtypes, tied tensors, buffers and exclusions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .buffers import merge_buffers
from .engine import Merger, merge_in_memory
from .plan import VOCAB_POLICIES, MergePlan, State, plan_merge, with_tied_tables
from .postprocess.registry import check_post_processors
from .registry import MergeMethod, get_merge_method
from .task_vectors import resolve_scale
from .tensors import FLOATING, check_finite, check_names, check_weights, content_names, converted
from .tying import alias_of, complete_ties


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
    vocab_policy: str = "error",
    postprocess: Sequence[Any] = (),
    **method_kwargs: Any,
) -> dict[str, Tensor]:
    """
    Merges fine-tuned models of one architecture into one state dict.

    `theta = theta_0 + lambda * merge({theta_t - theta_0})`, computed tensor by tensor one precision above the inputs
    and rounded once. The result is bit-equal for any order of the models (`opcm`, `slerp`, and
    copied tensors without a base excepted).

    Args:
        state_dicts (`Sequence[Mapping[str, Tensor] | nn.Module]`):
            T state dicts or modules. They are not changed, and the result shares no memory with them.
        base (`Mapping[str, Tensor] | nn.Module`, *optional*):
            The common starting point. Methods on parameters (mean, slerp, karcher, fisher, regmean) work without.
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
        vocab_policy (`str`, *optional*, defaults to `"error"`):
            Embeddings and language-model heads with different numbers of rows: an `"error"`, or merge the `"common"`
            leading rows and take the others from the base (or the first model).
        postprocess (`Sequence`, *optional*):
            Post-processors of the merged task vector, by name or as `{name: {keyword: value}}`; see
            [`list_post_processors`].
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

    Cost: one pass; memory is the result plus what the method holds of one tensor. `scaling_coefficient="norm"` (except
    with linear methods) holds the merged task vector as well; thresholds over the whole model cost further passes.

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
        hint = "; call recalibrate_batch_norm on the merged model" if buffers == "recalibrate" else ""
        raise ValueError(f"buffers={buffers!r} is unknown; choose 'pooled' or 'base'{hint}.")
    if vocab_policy not in VOCAB_POLICIES:
        raise ValueError(f"vocab_policy={vocab_policy!r} is unknown; choose {' or '.join(map(repr, VOCAB_POLICIES))}.")
    check_post_processors(postprocess)
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of name patterns; write exclude=[{exclude!r}].")
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"dtype={dtype!r} is no type for weights; choose one of {', '.join(map(str, FLOATING))}.")
    if isinstance(state_dicts, (Mapping, nn.Module)):
        raise ValueError("state_dicts is one model; give a list of at least one state dict or module.")
    models = [_as_dict(item) for item in state_dicts]
    if not models:
        raise ValueError("There is nothing to merge: state_dicts is empty.")
    values = check_weights(weights, len(models))
    given = check_names(names, len(models)) if names is not None else None
    origin = _as_dict(base) if base is not None else None
    if origin is None:
        check_base_free(rule, scale, buffers, postprocess)

    inputs = models if origin is None else [*models, origin]
    complete_ties(inputs)
    plan = plan_merge(
        models, origin, exclude=exclude, strict=strict, buffers=buffers, vocab_policy=vocab_policy, dtype=dtype
    )
    labels = given or [f"model {index}" for index in range(len(models))]
    for label, state in zip([*labels, "base"], inputs, strict=False):
        for key in plan.leaders:
            check_finite(state[key], key, label)
    if rule.requires_base and (note := half_precision_note(models, plan.leaders)):
        warnings.warn(note, stacklevel=2)
    labels = given or content_names(models, values, plan.leaders)
    method_kwargs = with_tied_tables(rule, method_kwargs, plan.groups)
    # A tensor that is a transposed view would be copied anew for every piece that is read.
    readable = [_contiguous(model) for model in models]
    readable_origin = _contiguous(origin) if origin is not None else None
    merger = Merger(plan, readable, readable_origin, rule, values, labels, method_kwargs, scale, list(postprocess))
    return _assemble(plan, models, merge_in_memory(merger), values, dtype)


def half_precision_note(models: Sequence[State], keys: Sequence[str]) -> str:
    """What to tell whoever merges task vectors of such models; empty where they are stored in single precision."""
    if any(model[key].dtype.itemsize < 4 for model in models for key in keys):
        return "The models are stored in half precision, which has already rounded their task vectors."
    return ""


def check_base_free(rule: MergeMethod, scale: float | str, buffers: str, postprocess: Sequence[Any] = ()) -> None:
    """Raises `ValueError` where something asked for needs a base model, and there is none."""
    if rule.requires_base:
        raise ValueError(f"Merge method '{rule.name}' works on task vectors and needs a base model; pass base=...")
    if scale != 1.0:
        raise ValueError(f"scaling_coefficient={scale!r} scales task vectors and needs a base model; pass base=...")
    if postprocess:
        raise ValueError("postprocess works on task vectors and needs a base model; pass base=...")
    if buffers == "base":
        raise ValueError("buffers='base' needs a base model; pass base=... or buffers='pooled'.")


def _assemble(
    plan: MergePlan,
    models: Sequence[State],
    merged: Mapping[str, Tensor],
    weights: Sequence[float],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The whole state dict: merged tensors, pooled buffers, and copies of everything else the reference has."""
    reference, leader_of = plan.reference, plan.leader_of
    statistics = merge_buffers(
        [{key: model[key] for key in plan.pooled} for model in models],
        {key: reference[key] for key in plan.pooled},
        weights,
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
                wanted = dtype if dtype is not None and copy.is_floating_point() else copy.dtype
                copies[identity] = converted(copy, wanted, key)
            result[key] = copies[identity]
    return result


def _as_dict(item: State | nn.Module) -> dict[str, Tensor]:
    return dict(item.state_dict() if isinstance(item, nn.Module) else item)


def _contiguous(state: State) -> State:
    return {key: tensor.contiguous() if isinstance(tensor, Tensor) else tensor for key, tensor in state.items()}
