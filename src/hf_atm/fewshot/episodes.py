"""Episodes: N classes, K support and Q query samples each, drawn by number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..seeding import derive_seed


@dataclass(frozen=True, eq=False)
class Episode:
    """One N-way K-shot problem, as rows of a data set.

    Attributes:
        classes: the `N` labels, ascending; class `n` of the episode is `classes[n]`.
        support: rows that define the classes, int64 `(N, K)`.
        query: rows to be classified, int64 `(N, Q)`; none of them is in `support`.
        seed: decides everything else that is random about the episode.
    """

    classes: tuple[int, ...]
    support: np.ndarray
    query: np.ndarray
    seed: int


class EpisodeSampler(Dataset):
    """Draws episodes: `sampler[i]` is a function of (seed, epoch, i) alone, so workers and resuming change nothing.

    Args:
        labels (`Sequence[int]`): The label of every row of a data set.
        n_way (`int`): Classes per episode, at least 2.
        k_shot (`int`): Support samples per class, at least 1.
        n_query (`int`): Query samples per class, at least 1.
        num_episodes (`int`): Episodes per epoch.
        classes (`Iterable[int]`, *optional*): Draw from these labels only; all that occur by default.
        seed (`int`, *optional*, defaults to 0): Decides the episodes, together with the epoch.
        class_names (`Mapping[int, str]`, *optional*): Names of the classes, for messages.

    Raises:
        ValueError: If there are fewer classes than `n_way`, or a class has fewer samples than `k_shot + n_query`.

    Example:

    ```python
    >>> sampler = EpisodeSampler([0, 0, 0, 1, 1, 1, 2, 2, 2], n_way=2, k_shot=1, n_query=2, num_episodes=10)
    >>> sampler[0].support.shape, sampler[0].query.shape
    ((2, 1), (2, 2))
    ```
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        n_way: int,
        k_shot: int,
        n_query: int,
        num_episodes: int,
        classes: Iterable[int] | None = None,
        seed: int = 0,
        class_names: Mapping[int, str] | None = None,
    ) -> None:
        least = {
            "n_way": (n_way, 2),
            "k_shot": (k_shot, 1),
            "n_query": (n_query, 1),
            "num_episodes": (num_episodes, 1),
        }
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"{name} is {value}; an episode needs at least {smallest}.")
        values = np.asarray(labels)
        if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
            raise ValueError(
                f"labels must be one whole number per sample, not {values.dtype} of shape {values.shape}."
            )
        chosen = np.unique(values).tolist() if classes is None else sorted(int(label) for label in classes)
        if len(set(chosen)) < len(chosen):
            twice = next(label for label in chosen if chosen.count(label) > 1)
            raise ValueError(f"classes names {twice} twice; name every class once.")
        if len(chosen) < n_way:
            raise ValueError(f"episodes of {n_way} classes need {n_way} of them, and there are {len(chosen)}.")
        self.rows = {label: np.flatnonzero(values == label) for label in chosen}
        for label, rows in self.rows.items():
            shown = repr(class_names[label]) if class_names and label in class_names else label
            if len(rows) == 0:
                raise ValueError(f"class {shown} has no samples; leave it out of classes.")
            if len(rows) < k_shot + n_query:
                raise ValueError(
                    f"class {shown} has {len(rows)} samples, and an episode takes {k_shot} + {n_query} of each class; "
                    "lower k_shot or n_query, or leave the class out."
                )
        self.n_way, self.k_shot, self.n_query, self.num_episodes = n_way, k_shot, n_query, num_episodes
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draws other episodes from now on; Accelerate calls it before every epoch of a Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_episodes

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of {self.num_episodes} does not exist")
        return self.draw(derive_seed("episode", self.seed, self.epoch, int(index)))

    def draw(self, seed: int) -> Episode:
        """The episode that a seed decides."""
        generator = np.random.Generator(np.random.PCG64(seed))
        labels = list(self.rows)
        places = sorted(_draw(generator, len(labels), self.n_way).tolist())
        classes = tuple(labels[place] for place in places)
        taken = self.k_shot + self.n_query
        rows = np.stack([self.rows[label][_draw(generator, len(self.rows[label]), taken)] for label in classes])
        return Episode(classes, rows[:, : self.k_shot], rows[:, self.k_shot :], seed)


def _draw(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    # Ranks of uniform numbers: `choice` may change its stream between versions of NumPy, `random` does not.
    return np.argsort(generator.random(size), kind="stable")[:count]


def labels_of(dataset: Any) -> np.ndarray:
    """The labels of a data set, without reading anything else of it.

    Args:
        dataset: Something with `labels`, a Hugging Face data set with a column `label` or `labels`, or a sequence of
            mappings that have one.

    Returns:
        `np.ndarray`: int64, one label per row.

    Raises:
        ValueError: If there are none, or they are no whole numbers.
    """
    column: Any = getattr(dataset, "labels", None)
    if column is None:
        names = getattr(dataset, "column_names", None)
        if names is None:
            names = list(dataset[0]) if len(dataset) and isinstance(dataset[0], Mapping) else []
        name = next((name for name in ("labels", "label") if name in names), None)
        if name is None:
            raise ValueError(f"{type(dataset).__name__} has no labels; give it a column named label or labels.")
        if hasattr(dataset, "with_format"):
            column = dataset.with_format("numpy", columns=[name])[name][:]
        else:
            column = [row[name] for row in dataset]
    values = np.asarray(column)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"labels must be one whole number per sample, not {values.dtype} of shape {values.shape}.")
    return values.astype(np.int64)


def check_class_split(base: Iterable[int], novel: Iterable[int]) -> None:
    """Refuses base and novel classes that overlap: scores on novel classes would be those of seen ones.

    Args:
        base, novel (`Iterable[int]`): The classes.

    Raises:
        ValueError: Naming the classes in both.
    """
    both = sorted(set(base) & set(novel))
    if both:
        raise ValueError(f"classes {', '.join(map(str, both))} are both base and novel; keep each in one of them.")


def class_indices(classes: Iterable[Any], names: Sequence[str] | None, where: str = "classes") -> list[int]:
    """Labels of classes given by name; without names, by label. A number that is a name means that name.

    Args:
        classes (`Iterable`): Names or labels.
        names (`Sequence[str]`, *optional*): Names of all classes, in the order of their labels.
        where (`str`, *optional*, defaults to `"classes"`): Said in the message.

    Returns:
        `list[int]`: ascending.

    Raises:
        ValueError: If a class is unknown.
    """
    if names is None:
        return sorted(int(label) for label in classes)
    known = list(names)
    wanted = list(classes)
    unknown = [label for label in wanted if str(label) not in known]
    if unknown:
        raise ValueError(f"{where} names the class {unknown[0]!r}; the classes are {', '.join(known)}.")
    return sorted(known.index(str(label)) for label in wanted)
