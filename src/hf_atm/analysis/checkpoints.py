"""Task vectors of finished checkpoints or adapters, read from disk tensor by tensor."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..merging.checkpoints.reader import CheckpointReader, is_adapter, resolve_model
from ..merging.engine import ModelView
from ..merging.plan import MergePlan, matches, plan_merge
from ..merging.tensors import listed, result_dtype


def open_task_vectors(
    base: str, models: Sequence[str], names: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
    """
    Opens models as lazy task vectors, in memory one tensor at a time.

    Args:
        base (`str`):
            Folder, `.safetensors` file or Hub id. Adapters stand for their updates by themselves, so there it is not
            read.
        models (`Sequence[str]`):
            Likewise: T full checkpoints, or T LoRA adapters.
        names (`Sequence[str]`, *optional*):
            T different task names; by default the folders' names, with their parents' as far as it takes to differ.
        exclude (`Sequence[str]`, *optional*):
            Name patterns of tensors to leave out.

    Returns:
        `tuple[dict, list]`: by task, a mapping of differences by tensor name; and the names of tensors that not all
        models have in the same shape, such as heads.

    Raises:
        `FileNotFoundError`, `ValueError`: for what cannot be opened, a mixture of both kinds, repeated names, and
        models that share less than half of the base's parameters.
    """
    if not models:
        raise ValueError("Name at least one model beside the base.")
    tasks = list(names) if names else distinct_names(models)
    if len(tasks) != len(models) or len(set(tasks)) != len(tasks):
        raise ValueError(f"There are {len(models)} models, which need as many different names, not {tasks}.")
    folders = [resolve_model(model) for model in models]
    adapters = [is_adapter(folder) for folder in folders]
    if any(adapters):
        if not all(adapters):
            whole = models[adapters.index(False)]
            raise ValueError(
                f"{whole!r} is no adapter, and {models[adapters.index(True)]!r} is one; compare like with like."
            )
        return _adapter_updates(folders, tasks, exclude), []
    readers = [CheckpointReader(folder) for folder in folders]
    origin = CheckpointReader(resolve_model(base))
    _check_likeness(base, origin, readers, exclude)
    plan = _plan(readers, origin, exclude)
    compared = set(plan.leader_of)
    skipped = sorted({key for state in (*readers, origin) for key in state} - compared)
    return {
        task: ModelView(task, reader, origin, plan, plan.leaders) for task, reader in zip(tasks, readers, strict=True)
    }, skipped


def _check_likeness(
    base: str, origin: CheckpointReader, readers: Sequence[CheckpointReader], exclude: Sequence[str]
) -> None:
    """Refuse models that are not of one architecture, from names and shapes."""
    shared = [
        key
        for key, tensor in origin.items()
        if tensor.is_floating_point()
        and all(key in reader and reader[key].shape[1:] == tensor.shape[1:] for reader in readers)
    ]
    part, total = (sum(origin[key].numel() for key in keys) for keys in (shared, origin))
    if part < total / 2:
        raise ValueError(
            f"The models share only {part / total:.0%} of the parameters of {base!r}; they are of another architecture, "
            "or tuned from another base."
        )
    if all(matches(key, exclude) for key in shared):
        raise ValueError(f"exclude leaves nothing to compare: {listed(list(exclude))}.")


def _plan(readers: Sequence[CheckpointReader], origin: CheckpointReader, exclude: Sequence[str]) -> MergePlan:
    with warnings.catch_warnings():
        # What does not match is returned by name.
        warnings.simplefilter("ignore")
        plan = plan_merge(readers, origin, exclude=exclude, strict=False, vocab_policy="common")
    # The difference of two float32 numbers, rounded once, is as exact as a float32 can be.
    return dataclasses.replace(plan, dtypes={key: result_dtype(dtype) for key, dtype in plan.out_dtypes.items()})


def _adapter_updates(
    folders: Sequence[Path], tasks: Sequence[str], exclude: Sequence[str]
) -> dict[str, Mapping[str, Tensor]]:
    from ..merging.adapters.compatibility import check_compatible
    from ..merging.adapters.reading import read_adapters
    from ..merging.adapters.updates import DenseUpdates

    adapters = read_adapters([str(folder) for folder in folders], list(tasks))
    layouts = check_compatible(adapters, strict=False)
    kept = {name: layout for name, layout in layouts.items() if not matches(name, exclude)}
    if not kept:
        raise ValueError(f"exclude leaves nothing of the adapters' modules {listed(sorted(layouts))}.")
    return {adapter.name: DenseUpdates(adapter, kept, torch.float32) for adapter in adapters}


def distinct_names(models: Sequence[str]) -> list[str]:
    """The last parts of paths or ids, as many as it takes to tell them apart."""
    parts = [Path(model.rstrip("/")).parts for model in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"A model is given twice: {listed(sorted(models))}.")
