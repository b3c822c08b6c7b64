"""One map-style data set per round out of one data set per task."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from .episodic import TaskEpisode, collate_episodes
from .schedule import RoundPlan
from .seeding import derive_seed, isolated_rng


class TaskExample(NamedTuple):
    """One example on its way to the collator; a tuple, so that the Trainer's column filter leaves it alone.

    Attributes:
        task: the task it belongs to.
        seed: decides everything random about it (augmentation, and the collation of a batch it opens).
        features: what the task's own data set returned.
    """

    task: str
    seed: int
    features: Any


def segment_length(
    task: str,
    num_examples: int,
    global_batch: int,
    local_epochs: float,
    local_steps: int | None,
    drop_last: bool,
) -> int:
    """Optimizer steps of one task in one round.

    Args:
        task (`str`): named in errors.
        num_examples (`int`): examples of the task.
        global_batch (`int`): examples per optimizer step: per-device batch x accumulation x processes.
        local_epochs (`float`): epochs per round, fractions allowed; ignored when `local_steps` is given.
        local_steps (`int`, *optional*): optimizer steps per round.
        drop_last (`bool`): round down instead of filling the last step from the next epoch's order.

    Raises:
        ValueError: for an empty data set, or when the segment would be shorter than one global batch.
    """
    if num_examples == 0:
        raise ValueError(f"The training data set of task {task!r} is empty; leave the task out or give it examples.")
    if local_steps is not None:
        if drop_last and num_examples < global_batch:
            raise ValueError(
                f"Task {task!r} has {num_examples} examples, fewer than one global batch of {global_batch}; lower "
                "per_device_train_batch_size or gradient_accumulation_steps, or set dataloader_drop_last=False."
            )
        return local_steps
    examples = num_examples * local_epochs
    if examples < global_batch - 1e-9:
        raise ValueError(
            f"Task {task!r} has {num_examples} examples x local_epochs={local_epochs:g} = {examples:g}, less than one "
            f"global batch of {global_batch}; lower per_device_train_batch_size or gradient_accumulation_steps, raise "
            "local_epochs, or set local_steps."
        )
    steps = examples / global_batch
    # A tolerance keeps 0.1 * 320 / 32 from becoming two steps.
    return math.floor(steps + 1e-9) if drop_last else math.ceil(steps - 1e-9)


def head_step_counts(lengths: Mapping[str, int], head_steps: float) -> dict[str, int]:
    """How many of each task's steps per round are head steps.

    Args:
        lengths (`Mapping[str, int]`): optimizer steps per task and round.
        head_steps (`float`): a whole number, or below 1 a fraction of a task's steps, of which there is at least one.

    Raises:
        ValueError: when nothing is left for tuning.
    """
    counts = {}
    for task, length in lengths.items():
        counts[task] = max(1, round(head_steps * length)) if 0 < head_steps < 1 else int(head_steps)
        if counts[task] >= length:
            raise ValueError(
                f"head_steps={head_steps:g} leaves nothing of the {length} steps of task {task!r} for tuning before the "
                "merge; lower it, or raise local_steps."
            )
    return counts


class RoundDataset(Dataset):
    """All examples of one round, segment after segment; read it sequentially.

    Every task's examples form an endless stream of shuffled epochs, drawn anew each round from (seed, round, task,
    epoch). A segment is the first `length x global_batch` examples of its task's stream (a settling segment the next
    ones), so no optimizer step ever mixes two tasks, whatever the number of processes.

    Args:
        datasets (`Mapping[str, Sequence]`): one map-style data set per task of the plan.
        plan (`RoundPlan`): the run's plan.
        global_batch (`int`): examples per optimizer step over all processes.
        seed (`int`): decides the order and everything random in the data sets' own transforms.
        shuffle (`bool`, *optional*, defaults to `True`): `False` keeps every epoch in the stored order.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence],
        plan: RoundPlan,
        global_batch: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.datasets = {task: datasets[task] for task in plan.tasks}
        self.plan = plan
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle
        self.round = 0
        self._ends = list(accumulate(length * global_batch for _, length, _ in plan.segments))
        self._random = {task: _may_be_random(dataset) for task, dataset in self.datasets.items()}
        # One entry per task and epoch of a round would be plenty; a bound keeps many short epochs from piling up.
        self._order = lru_cache(maxsize=2 * len(plan.tasks))(self._permutation)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate before every epoch of the Trainer: one epoch is one round."""
        self.round = epoch

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[str, int, int]:
        """Task, epoch within the segment and row of the `index`-th example of this round."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a round of {len(self)} examples")
        task, position = self._place(index)
        epoch, within = divmod(position, len(self.datasets[task]))
        return task, epoch, int(self._order(self.round, task, epoch)[within])

    def _place(self, index: int) -> tuple[str, int]:
        """Task of the `index`-th example, and its position in that task's stream of this round."""
        segment = bisect_right(self._ends, index)
        task, _, settling = self.plan.segments[segment]
        # A settling segment goes on in the task's stream where its tuning stopped.
        before = self.plan.tuning_steps[task] * self.global_batch if settling else 0
        return task, before + index - (self._ends[segment - 1] if segment else 0)

    def __getitem__(self, index: int) -> TaskExample:
        task, epoch, row = self.locate(index)
        seed = derive_seed(self.seed, self.round, task, epoch, row)
        dataset = self.datasets[task]
        if not self._random[task]:
            return TaskExample(task, seed, dataset[row])
        with isolated_rng(seed):
            return TaskExample(task, seed, dataset[row])

    def __getitems__(self, indices: list[int]) -> list[TaskExample]:
        located = [self.locate(index) for index in indices]
        task = located[0][0]
        fetch = getattr(self.datasets[task], "__getitems__", None)
        if fetch is None or self._random[task] or any(other != task for other, _, _ in located):
            return [self[index] for index in indices]
        rows = fetch([row for _, _, row in located])
        seeds = (derive_seed(self.seed, self.round, task, epoch, row) for _, epoch, row in located)
        return [TaskExample(task, seed, features) for seed, features in zip(seeds, rows, strict=True)]

    def _permutation(self, round_index: int, task: str, epoch: int) -> torch.Tensor:
        size = len(self.datasets[task])
        if not self.shuffle:
            return torch.arange(size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, round_index, task, epoch))
        return torch.randperm(size, generator=generator)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2 * len(self.plan.tasks))(self._permutation)


class TaskDataset(Dataset):
    """One task's evaluation or prediction data set, its examples marked with the task's name.

    Args:
        dataset (`Sequence`): a map-style data set.
        task (`str`): the task whose head, collator and metrics apply.
    """

    def __init__(self, dataset: Sequence, task: str) -> None:
        self.dataset = dataset
        self.task = task

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> TaskExample:
        return TaskExample(self.task, derive_seed("eval", self.task, index), self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[TaskExample]:
        fetch = getattr(self.dataset, "__getitems__", None)
        rows = [self.dataset[index] for index in indices] if fetch is None else fetch(indices)
        return [
            TaskExample(self.task, derive_seed("eval", self.task, index), features)
            for index, features in zip(indices, rows, strict=True)
        ]


class TaskCollator:
    """Collates batches that hold one task each, with that task's collator.

    Random collators (masking, for instance) draw from the first example's seed, so that a resumed run, another number
    of workers or an evaluation in between changes nothing.

    Args:
        default (`Callable`): collator of every task that has none of its own, and of plain features.
        collators (`Mapping[str, Callable]`, *optional*): collators by task.
        add_task (`bool`): put the task's name into the batch, for models whose `forward` takes `task`.
        columns (`Sequence[str]`, *optional*): keep only these keys of dict-like features.
    """

    def __init__(
        self,
        default: Callable,
        collators: Mapping[str, Callable] | None = None,
        add_task: bool = False,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.default = default
        self.collators = dict(collators or {})
        self.add_task = add_task
        self.columns = None if columns is None else frozenset(columns)

    @property
    def by_task(self) -> bool:
        """Whether a batch's task matters to its collation."""
        return self.add_task or bool(self.collators)

    @property
    def tokenizer(self) -> Any:
        """The wrapped collator's tokenizer, which Trainer saves when it was given no processing class."""
        return getattr(self.default, "tokenizer", None)

    def __call__(self, examples: list[Any]) -> Any:
        if not isinstance(examples[0], TaskExample):
            return self.default(examples)
        task = examples[0].task
        if any(example.task != task for example in examples):
            names = sorted({example.task for example in examples})
            raise RuntimeError(f"A batch mixes the tasks {names}; a step must belong to one task.")
        with isolated_rng(examples[0].seed):
            batch = self.collate(task, [example.features for example in examples])
        if self.add_task:
            batch["task"] = task
        return batch

    def collate(self, task: str, features: Sequence[Any]) -> Any:
        """A batch of one task's own features, without the task's name."""
        if isinstance(features[0], TaskEpisode):
            return collate_episodes(features, partial(self.collate, task))
        return self.collators.get(task, self.default)([self._kept(feature) for feature in features])

    def _kept(self, features: Any) -> Any:
        if self.columns is None or not isinstance(features, Mapping):
            return features
        return {name: value for name, value in features.items() if name in self.columns}


def _may_be_random(dataset: Any) -> bool:
    """Whether reading a row can draw random numbers: a transform, or a class we know nothing about."""
    if not hasattr(dataset, "column_names"):
        return not isinstance(dataset, (list, tuple, torch.utils.data.TensorDataset))
    return getattr(dataset, "format", {}).get("type") == "custom"
