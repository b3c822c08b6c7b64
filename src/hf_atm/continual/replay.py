"""A small stored sample of an earlier task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..seeding import derive_seed


def replay_size(task: str, num_examples: int, replay: int | float) -> int:
    """How many examples of a task are kept.

    Args:
        task (`str`): named in errors.
        num_examples (`int`): the task's training examples.
        replay (`int` or `float`): a whole number of examples, or a fraction below 1 of them; 0 keeps none.

    Raises:
        ValueError: when it is negative, no number, or more than there are.
    """
    if isinstance(replay, bool) or not isinstance(replay, (int, float)) or not (replay >= 0 and math.isfinite(replay)):
        raise ValueError(f"replay is {replay!r}; give a number of examples, or a fraction between 0 and 1.")
    if isinstance(replay, float) and replay != int(replay) and replay > 1:
        raise ValueError(f"replay is {replay!r}; give a whole number of examples, or a fraction between 0 and 1.")
    if isinstance(replay, float) and replay <= 1:
        return round(replay * num_examples)
    if replay > num_examples:
        raise ValueError(f"replay={replay} is more than the {num_examples} examples of task {task!r}; lower it.")
    return int(replay)


def replay_sample(task: str, dataset: Any, replay: int | float, seed: int = 0) -> Any | None:
    """The examples of a task that are kept once its turn is over.

    Args:
        task (`str`): the task; with `seed` it decides which ones.
        dataset (`Dataset`): a Hugging Face data set.
        replay (`int` or `float`): see [`replay_size`].
        seed (`int`, *optional*, defaults to 0): decides the sample.

    Returns:
        `Dataset`: the sample, or `None` if it is empty.
    """
    size = replay_size(task, len(dataset), replay)
    return dataset.shuffle(seed=derive_seed(seed, "replay", task) % 2**32).select(range(size)) if size else None


def check_replay(datasets: Mapping[str, Any], replay: int | float) -> None:
    """Refuse a replay that some task has too few examples for, before anything runs."""
    for task, dataset in datasets.items():
        if replay and not replay_size(task, len(dataset), replay):
            raise ValueError(
                f"replay={replay} keeps none of the {len(dataset)} examples of task {task!r}; raise it, or set it to 0."
            )
