"""Embeddings with the ids of their samples: one model's, and what several models' become together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..merging.tensors import all_finite
from .ids import as_ids, named, positions, repeated
from .storage import read_tensors, write_tensors


S = TypeVar("S", bound="_Rows")

UNKNOWN_LABEL = -1


class _Rows:
    """What both kinds of space share: rows found, chosen and left out by id, and one file."""

    _per_row: ClassVar[tuple[str, ...]]
    ids: Any
    embeddings: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """How messages call it."""
        return "the latent space"

    def _check(self) -> None:
        """Bring ids, embeddings and labels into their types."""
        ids = as_ids(self.ids, f"the ids of {self.name}")
        embeddings = torch.as_tensor(self.embeddings).detach()
        if embeddings.dim() != 2:
            raise ValueError(f"The embeddings of {self.name} have shape {tuple(embeddings.shape)}, not (rows, width).")
        embeddings = embeddings.to("cpu", torch.float32)
        twice = repeated(ids)
        if len(twice):
            raise ValueError(f"{self.name} holds the ids {named(twice)} more than once; keep one row of each.")
        if len(ids) != len(embeddings):
            raise ValueError(f"{self.name} has {len(ids)} ids and {len(embeddings)} embeddings; give one id per row.")
        if not all_finite(embeddings):
            wrong = ids[(~embeddings.isfinite()).any(1).numpy()]
            raise ValueError(f"{self.name} has embeddings that are not finite, at the ids {named(wrong)}.")
        self._set("ids", ids)
        self._set("embeddings", embeddings)
        if self.labels is not None:
            self._set("labels", _as_labels(self.labels, len(ids), self.name))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def positions(self, ids: Any) -> np.ndarray:
        """
        The rows of the given ids, in their order.

        Raises:
            `KeyError`: naming those it does not have.
        """
        wanted = as_ids(ids)
        rows = positions(self.ids, wanted)
        if (rows < 0).any():
            raise KeyError(f"{self.name} lacks the ids {named(wanted[rows < 0])}; embed these samples too.")
        return rows

    def select(self: S, ids: Any) -> S:
        """The rows of the given ids, in their order; see [`positions`]."""
        return self._take(self.positions(ids))

    def drop(self: S, ids: Any) -> S:
        """All rows but those of the given ids, which need not be there: anchors, before anything is measured."""
        return self._take(np.flatnonzero(positions(as_ids(ids), self.ids) < 0))

    def _take(self: S, rows: np.ndarray) -> S:
        index = torch.from_numpy(rows)
        values = {name: getattr(self, name) for name in self._per_row}
        chosen = {
            name: value[rows] if isinstance(value, np.ndarray) else value[index]
            for name, value in values.items()
            if value is not None
        }
        return replace(self, **chosen)  # type: ignore[type-var]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, complete or not at all."""
        write_tensors(path, type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self)})  # type: ignore[arg-type]

    @classmethod
    def load(cls: type[S], path: str | os.PathLike) -> S:
        """
        Read what [`save`] wrote.

        Raises:
            `FileNotFoundError`: when there is no such file.
            `ValueError`: when it holds something else.
        """
        return cls(**read_tensors(path, cls.__name__))


@dataclass(frozen=True, eq=False)
class EmbeddingSet(_Rows):
    """
    One model's embeddings of some samples.

    Args:
        task (`str`):
            Names the space; sets that are used together have different ones.
        ids (`Sequence[int]` or `Sequence[str]`):
            Names the samples, N of them, each once. A sample has the same id in every space.
        embeddings (`Tensor`):
            `(N, width)`, finite; kept as float32. Widths may differ between spaces.
        labels (`Tensor`, *optional*):
            `(N,)`, classes from 0; -1 where the class is unknown.
        own (`Tensor`, *optional*):
            `(N,)`, bool: samples known to belong to this task, such as those the model was trained on. Only routing
            reads it, see [`aggregate_latent_spaces`].

    Raises:
        `ValueError`: for ids that repeat, and embeddings, labels or marks that do not fit them or are not finite.
    """

    task: str
    ids: Any
    embeddings: Any
    labels: Any = None
    own: Any = None

    _per_row: ClassVar[tuple[str, ...]] = ("ids", "embeddings", "labels", "own")

    @property
    def name(self) -> str:
        return f"the space {self.task!r}"

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not self.task:
            raise ValueError(f"The task of an embedding set is {self.task!r}; give it a name.")
        self._check()
        if self.own is not None:
            own = torch.as_tensor(self.own).to("cpu")
            if own.dtype != torch.bool or own.shape != (len(self),):
                raise ValueError(f"own of {self.name} must hold {len(self)} times true or false, one per row.")
            self._set("own", own)


@dataclass(frozen=True, eq=False)
class LatentSpace(_Rows):
    """
    Several models' spaces as one: cosines to the same anchors, averaged where models share a sample.

    Averaged rows are no longer cosines of one space; only comparisons within the space mean anything.

    Args:
        ids (`np.ndarray`):
            `(N,)`, int64 or text; sorted by [`aggregate_latent_spaces`].
        embeddings (`Tensor`):
            `(N, m)`, float32.
        labels (`Tensor`, *optional*):
            `(N,)`, int64; -1 where no space knows the class.
        sources (`Tensor`):
            `(N, T)`, bool: the spaces that each row was averaged from.
        tasks (`list[str]`):
            Names of the T spaces.
        anchors (`np.ndarray`):
            `(m,)`, ids of the anchors, in the order of the columns.
    """

    ids: Any
    embeddings: Any
    labels: Any
    sources: Any
    tasks: Any
    anchors: Any

    _per_row: ClassVar[tuple[str, ...]] = ("ids", "embeddings", "labels", "sources")

    def __post_init__(self) -> None:
        self._check()
        self._set("anchors", as_ids(self.anchors, "anchors"))
        self._set("tasks", list(self.tasks))
        if self.sources.shape != (len(self), len(self.tasks)):
            raise ValueError(
                f"sources must have a row per id and a column per task, {(len(self), len(self.tasks))}, not "
                f"{tuple(self.sources.shape)}."
            )


def _as_labels(labels: Any, count: int, name: str) -> Tensor:
    labels = torch.as_tensor(labels).detach().to("cpu")
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"The labels of {name} must be {count} classes, whole numbers from 0, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if count and int(labels.min()) < UNKNOWN_LABEL:
        raise ValueError(f"{name} has the label {int(labels.min())}; classes count from 0, and -1 is an unknown one.")
    return labels.long()


def check_sets(sets: Sequence[EmbeddingSet]) -> list[EmbeddingSet]:
    """
    Sets that are to be used together, sorted by task, so that their order changes nothing.

    Raises:
        `ValueError`: when there are none, two have one name, or their ids are of different kinds.
    """
    if isinstance(sets, EmbeddingSet):
        sets = [sets]
    if not sets:
        raise ValueError("No embedding sets were given; at least one is needed.")
    tasks = [entry.task for entry in sets]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"Several embedding sets are called {twice[0]!r}; give each its own task.")
    if len({entry.ids.dtype.kind for entry in sets if len(entry)}) > 1:
        raise ValueError("Some embedding sets have numbers for ids and others text; name samples in one way.")
    return sorted(sets, key=lambda entry: entry.task)


def merged_labels(sets: Sequence[EmbeddingSet], ids: np.ndarray) -> Tensor | None:
    """
    Each sample's class, from whichever sets know it; -1 where none does, `None` if no set has labels.

    Raises:
        `ValueError`: when two sets give a sample different classes.
    """
    if all(entry.labels is None for entry in sets):
        return None
    labels = np.full(len(ids), UNKNOWN_LABEL)
    for entry in sets:
        if entry.labels is None:
            continue
        rows = positions(entry.ids, ids)
        given = np.where(rows >= 0, entry.labels.numpy()[rows], UNKNOWN_LABEL)
        known = given != UNKNOWN_LABEL
        conflict = np.flatnonzero(known & (labels != UNKNOWN_LABEL) & (labels != given))
        if len(conflict):
            first = conflict[0]
            raise ValueError(
                f"The sample {named(ids[[first]])} has the label {given[first]} in {entry.name} and {labels[first]} in "
                "another; a sample has one class, so name classes alike or leave labels out."
            )
        labels[known] = given[known]
    return torch.from_numpy(labels)
