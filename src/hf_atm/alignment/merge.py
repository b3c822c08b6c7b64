"""From models of different starts to one that tuning can begin at: aligned, merged, repaired."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..merging.plan import matches
from ..merging.state_dict import merge_state_dicts
from .matching import align
from .repairing import repair
from .spec import PermutationSpec


def align_and_merge(
    models: Sequence[nn.Module],
    data: Iterable | None = None,
    *,
    method: str = "mean",
    base: nn.Module | None = None,
    exclude: Sequence[str] = (),
    spec: PermutationSpec | None = None,
    align_kwargs: Mapping[str, Any] | None = None,
    repair_kwargs: Mapping[str, Any] | None = None,
    **merge_kwargs: Any,
) -> tuple[nn.Module, list[nn.Module]]:
    """
    Merges models from different starts into one to tune from, with [`ATMTrainer`] or [`~hf_atm.refine.refine`].

    All models, and the base if there is one, are aligned; then they are merged in the order of the base's units, or of
    the first model's; then, given data, activations get back the spread that averaging took ([`repair`]).

    Args:
        models (`Sequence[nn.Module]`): at least two models of one architecture, or one and a base; not changed. Heads of
            different tasks may differ, if `exclude` names them.
        data (`Iterable`, *optional*): batches of a DataLoader, for the repair, and for `{"method": "activations"}`.
        method (`str`, *optional*, defaults to `"mean"`): a name of [`list_merge_methods`].
        base (`nn.Module`, *optional*): where task vectors begin, for methods that need them.
        exclude (`Sequence[str]`, *optional*): name patterns of tensors that are not merged, such as `"classifier.*"`; they
            stay those of the base or the first model.
        spec ([`PermutationSpec`], *optional*): as in [`align`].
        align_kwargs (`Mapping`, *optional*): further keywords of [`align`], such as `{"method": "git-rebasin"}`.
        repair_kwargs (`Mapping`, *optional*): further keywords of [`repair`], such as `{"num_batches": 8}`.
        **merge_kwargs: further keywords of [`merge_state_dicts`], the method's own among them.

    Returns:
        `tuple[nn.Module, list[nn.Module]]`: the merged model, and copies of the models in its order of units, whose heads
        fit it, as for [`MultiTaskModel.load_head`].

    Raises:
        `KeyError`, `ValueError`: for what [`align`], [`merge_state_dicts`] or [`repair`] refuse.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.alignment import align_and_merge, mlp_spec

    >>> models = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2)]
    >>> merged, aligned = align_and_merge(models, [torch.randn(16, 4)], spec=mlp_spec(models[0]))
    >>> torch.equal(aligned[0][0].weight, models[0][0].weight)
    True
    ```
    """
    options = dict(align_kwargs or {})
    if isinstance(data, Iterator):
        # It is read more than once.
        data = list(data)
    if options.get("method") == "activations":
        options.setdefault("data", data)
    inputs = [*models, *([base] if base is not None else [])]
    found = align(inputs, spec, **options)
    frame = len(models) if base is not None else 0
    aligned = []
    for place, model in enumerate(inputs):
        moved = copy.deepcopy(model)
        order = found.map(place, frame)
        if not order.is_identity:
            moved.load_state_dict(order.apply(model.state_dict()))
        aligned.append(moved)
    origin = aligned[frame] if base is not None else None
    merged = copy.deepcopy(aligned[frame])
    state = merge_state_dicts(aligned[: len(models)], base=origin, method=method, exclude=exclude, **merge_kwargs)
    merged.load_state_dict(state)
    if data is not None:
        kept = {name: tensor for name, tensor in state.items() if matches(name, exclude)}
        ends = [{**state, **model.state_dict(), **kept} for model in aligned[: len(models)]]
        merged = repair(merged, ends, data, **(repair_kwargs or {}))
    return merged, aligned[: len(models)]
