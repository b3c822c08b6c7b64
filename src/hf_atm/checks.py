"""Bad input, refused in one sentence before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset


def check_task_name(name: Any) -> None:
    """Refuse names that cannot be part of a parameter's name or a path.

    Raises:
        ValueError: naming the task and what it must not hold.
    """
    if not isinstance(name, str) or not name or any(character in name for character in "./\\") or name.isspace():
        raise ValueError(f"The task name {name!r} is not usable; give a non-empty name without '.', '/' or '\\'.")


def check_datasets(name: str, datasets: Any) -> dict[str, Any]:
    """Check `train_dataset` or `eval_dataset` on its own.

    Args:
        name (`str`): the argument, named in errors.
        datasets: what the user passed.

    Returns:
        `dict[str, Any]`: the data sets by task.

    Raises:
        ValueError: when it is no mapping, a name is unusable, or a data set is empty or has no length.
    """
    if not isinstance(datasets, Mapping) or not datasets or hasattr(datasets, "num_rows") and _is_split_dict(datasets):
        raise ValueError(
            f"{name} must map every task to its data set, {{'sst2': ..., 'cola': ...}}, got {type(datasets).__name__}."
        )
    for task, dataset in datasets.items():
        check_task_name(task)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or isinstance(dataset, Mapping):
            raise ValueError(
                f"{name}[{task!r}] is a {type(dataset).__name__}, but a task needs a map-style data set with a length; "
                "pass one split, not streamed."
            )
        if len(dataset) == 0:
            raise ValueError(f"{name}[{task!r}] is empty; leave the task out or give it examples.")
    return dict(datasets)


def _is_split_dict(datasets: Mapping) -> bool:
    return set(datasets) <= {"train", "validation", "test"}


def check_keys(name: str, keys: Iterable[str], tasks: Sequence[str]) -> None:
    """Check that a dictionary argument names exactly the run's tasks.

    Raises:
        ValueError: listing what is missing and what is unknown.
    """
    missing, unknown = sorted(set(tasks) - set(keys)), sorted(set(keys) - set(tasks))
    if missing or unknown:
        parts = [f"lacks {missing}"] * bool(missing) + [f"has unknown {unknown}"] * bool(unknown)
        raise ValueError(f"{name} {' and '.join(parts)}; the tasks are {sorted(tasks)}.")


def check_validation(args: Any, eval_sets: Mapping[str, Any]) -> None:
    """Refuse settings that measure something on validation data when there is none.

    Raises:
        ValueError: naming the setting.
    """
    wishes = {
        "eval_strategy": args.eval_strategy != "no",
        "eval_experts": args.eval_experts,
        "outer_learning_rate": args.outer_learning_rate == "search",
        "task_weights": args.task_weights == "loss_gap",
    }
    for name, wished in wishes.items():
        if wished and not eval_sets:
            value = getattr(args, name)
            raise ValueError(f"{name}={getattr(value, 'value', value)!r} needs eval_dataset={{task: dataset}}.")


def check_labels(model: Any, name: str, datasets: Mapping[str, Any]) -> None:
    """Check label counts and values of Hugging Face data sets against the heads of a multi-task model.

    Args:
        model: a [`MultiTaskModel`]; other models have no heads to check against.
        name (`str`): the argument, named in errors.
        datasets (`Mapping[str, Any]`): data sets by task; those that are no `datasets.Dataset` are skipped.

    Raises:
        ValueError: naming the task, the value and the valid range.
    """
    if not hasattr(model, "check_labels"):
        return
    for task, dataset in datasets.items():
        columns = getattr(dataset, "column_names", None) or []
        column = next((column for column in ("labels", "label", "label_ids") if column in columns), None)
        if column is None:
            continue
        classes = getattr(dataset.features[column], "names", None)
        spec = model.config.tasks[task]
        if classes is not None and spec["num_labels"] != len(classes):
            raise ValueError(
                f"{name}[{task!r}] has {len(classes)} classes ({', '.join(classes[:5])}{', ...' * (len(classes) > 5)}) "
                f"but the head of {task!r} has num_labels={spec['num_labels']}; make them equal."
            )
        # Numpy columns are read without running the data set's transform.
        values = dataset.with_format("numpy", columns=[column])[column][:]
        model.check_labels(task, np.asarray(values))
