"""Tasks that learn from episodes: what a step reads, and prototypes that follow the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from .fewshot.collating import EpisodeCollator, collate_rows
from .fewshot.episodes import Episode, EpisodeSampler, labels_of
from .parameters import base_model
from .prototypical import PooledPrototypicalHead, PrototypicalTaskHead
from .seeding import derive_seed, isolated_rng


class TaskEpisode(NamedTuple):
    """An episode on its way to the collator, with the data that it names rows of."""

    dataset: Any
    episode: Episode


class EpisodicDataset(Dataset):
    """A task's data set that gives an episode for each row read, another one every time.

    It has as many episodes to an epoch as there are rows. Which episode is read follows from torch's random state, as
    of any data set that draws; the loop sets that from seed, round, epoch and row.

    Args:
        dataset (`Sequence`): A map-style data set with labels.
        head ([`PrototypicalTaskHead`]): Says what an episode is made of.
        task (`str`): The task, named in errors.

    Raises:
        ValueError: If there are no labels, or the data do not suffice for an episode.
    """

    def __init__(self, dataset: Any, head: PrototypicalTaskHead, task: str) -> None:
        self.dataset = dataset
        self.sizes = (head.n_way, head.k_shot, head.n_query)
        feature = (getattr(dataset, "features", None) or {}).get("labels")
        names = dict(enumerate(getattr(feature, "names", None) or []))
        try:
            classes = range(len(head.prototypes))
            self.sampler = EpisodeSampler(labels_of(dataset), *self.sizes, len(dataset), classes, class_names=names)
        except ValueError as error:
            raise ValueError(f"Task {task!r} has a prototypical head: {error}") from None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> TaskEpisode:
        return TaskEpisode(self.dataset, self.sampler.draw(int(torch.randint(2**62, ()))))


def check_episodes(task: str, spec: Mapping[str, Any], dataset: Any) -> None:
    """Refuse data that do not suffice for a task's episodes, if it has any.

    Args:
        task (`str`): The task, named in errors.
        spec (`Mapping[str, Any]`): Its entry, from [`normalize_task`].
        dataset (`Sequence`): Its training data.

    Raises:
        ValueError: As of [`EpisodicDataset`].
    """
    if spec.get("head") == "prototypical":
        EpisodicDataset(dataset, PooledPrototypicalHead("mean", 1, dict(spec)), task)


def collate_episodes(drawn: Sequence[TaskEpisode], item_collator: Callable) -> dict[str, Any]:
    """A batch of episodes: their distinct samples collated, and `episodes`, which of them is where.

    Args:
        drawn (`Sequence[TaskEpisode]`): Episodes of one data set.
        item_collator (`Callable`): The task's own collator.

    Returns:
        `dict`: What the collator makes of the samples, without labels, and `episodes`, int64
        `(episodes, n_way, k_shot + n_query)`.
    """
    batch = EpisodeCollator(item_collator, drawn[0].dataset)([entry.episode for entry in drawn])
    return {**batch["items"], "episodes": batch["index"]}


def prototypical_head(model: nn.Module, task: str) -> PrototypicalTaskHead | None:
    """A task's prototypical head, or one inside its head, if it has any."""
    heads = getattr(base_model(model), "heads", None)
    if not isinstance(heads, nn.ModuleDict) or task not in heads:
        return None
    head: Any = heads[task]
    if (copies := getattr(head, "modules_to_save", None)) is not None:  # PEFT trains a copy
        head = copies[head.active_adapters[0]]
    return next((module for module in head.modules() if isinstance(module, PrototypicalTaskHead)), None)


def with_episodes(model: nn.Module, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets, those of tasks with a prototypical head giving episodes.

    Raises:
        ValueError: If a data set does not suffice.
    """
    heads = {task: prototypical_head(model, task) for task in datasets}
    return {
        task: dataset if (head := heads[task]) is None else EpisodicDataset(dataset, head, task)
        for task, dataset in datasets.items()
    }


def episode_sizes(datasets: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """What the episodes of each task that has any are made of; `None` if no task has."""
    return {task: list(data.sizes) for task, data in datasets.items() if isinstance(data, EpisodicDataset)} or None


@torch.no_grad()
def refresh_prototypes(
    model: Any, task: str, dataset: Any, collator: Callable[[list[Any]], Mapping[str, Any]], batch_size: int = 64
) -> None:
    """Computes the prototypes of a task with a prototypical head from the weights as they are.

    [`ATMTrainer`] does so before every evaluation and save. After any other change of weights, a merge of checkpoints
    included, it is yours to do.

    Args:
        model (`nn.Module`): A [`MultiTaskModel`], or any model whose head of the task is a
            [`PrototypicalTaskHead`].
        task (`str`): The task.
        dataset (`Sequence`): Its training data: a map-style data set with labels.
        collator (`Callable`): Collates samples without labels into the model's inputs.
        batch_size (`int`, *optional*, defaults to 64): Samples embedded at once.

    Raises:
        ValueError: If the task has no such head, or a class has no sample.
    """
    head = prototypical_head(model, task)
    if head is None:
        raise ValueError(f"task {task!r} has no prototypical head, so there is nothing to refresh")
    device = head.prototypes.device
    training = model.training
    model.eval()
    try:
        with isolated_rng(derive_seed("prototypes", task)), head.recording() as features:
            labels = torch.as_tensor(labels_of(dataset))
            if int(labels.max()) >= len(head.prototypes):
                raise ValueError(
                    f"task {task!r} has a sample of class {int(labels.max())}, and its head has {len(head.prototypes)} "
                    "classes, numbered from 0; leave the sample out"
                )
            for start in range(0, len(labels), batch_size):
                rows = range(start, min(start + batch_size, len(labels)))
                batch = collate_rows(dataset, rows, collator)
                model(**{name: value.to(device) for name, value in batch.items()}, task=task)
    finally:
        model.train(training)
    head.fit(torch.cat(features), labels.to(device))


def refresh_tasks(trainer: Any, tasks: Iterable[str] | None = None) -> None:
    """Refreshes the prototypes of a trainer's tasks, where they have any.

    Args:
        trainer ([`ATMTrainer`]): The trainer; its model, training data and collators are used.
        tasks (`Iterable[str]`, *optional*): Only these.
    """
    if trainer.atm.prototypes_held:
        return
    for task in trainer.atm.datasets if tasks is None else tasks:
        data = trainer.atm.datasets.get(task)
        if isinstance(data, EpisodicDataset):
            collate = partial(trainer.data_collator.collate, task)
            refresh_prototypes(trainer.model, task, data.dataset, collate, trainer.args.per_device_eval_batch_size)


def expert_prototypes(trainer: Any, task: str) -> dict[str, torch.Tensor]:
    """Prototypes of a task from the weights as they are, by buffer name; nothing if it has none.

    Args:
        trainer ([`ATMTrainer`]): The trainer, whose model has the task's own weights.
        task (`str`): The task.
    """
    if not isinstance(trainer.atm.datasets.get(task), EpisodicDataset):
        return {}
    refresh_tasks(trainer, [task])
    head = prototypical_head(trainer.model, task)
    buffers = dict(trainer.model.named_buffers())
    return {name: buffer.clone() for name, buffer in buffers.items() if head is not None and buffer is head.prototypes}
