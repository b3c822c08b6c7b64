"""RLSA: several models' spaces, expressed by the same anchors, become one (https://huggingface.co/papers/2311.06547)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch

from ..merging.tensors import nearest
from .anchors import select_anchors
from .ids import named, positions
from .relative import CHUNK, RelativeProjector, row_norms
from .routing import ROUTERS, Scorer, check_own, route
from .spaces import EmbeddingSet, LatentSpace, check_sets, merged_labels


DUPLICATES = ("mean", "first")
ROUTINGS = ("average", *ROUTERS, "oracle")


def aggregate_latent_spaces(
    sets: Sequence[EmbeddingSet],
    anchors: Any = None,
    routing: str | Callable[[EmbeddingSet], Scorer] = "average",
    duplicates: str = "mean",
    standardize: bool = False,
    chunk_size: int = CHUNK,
    fit_ids: Any = None,
    **selection: Any,
) -> LatentSpace:
    """
    Relative latent space aggregation (RLSA): cosines to common anchors, averaged over the spaces that know a sample.

    No weights are touched, so models of any architecture can take part. The rows are the union of all ids, sorted.
    Which of the spaces that hold a sample make its row is decided by `routing`:

    - `"average"`: all of them. Needs nothing to be known about tasks.
    - `"oracle"`: those whose `own` marks the sample. With test samples marked by their true task this is the published
      evaluation, which tells the space which classes to expect; report it as such.
    - `"knn"`, `"mahalanobis"`, `"confidence"`: those whose `own` marks the sample; where none does, the one space
      that it fits best, by its own samples, see [`~hf_atm.latent.routing.knn`] and beside it.
    - a callable: likewise. It is called once per space with the [`EmbeddingSet`] of its own samples and returns a
      function from embeddings `(n, width)` to scores `(n,)`; the highest wins.

    Anchors that no space owns are averaged under every routing.

    Args:
        sets (`Sequence[EmbeddingSet]`):
            The spaces, of different tasks. Their order changes nothing, nor that of their rows.
        anchors (`Sequence`, *optional*):
            Ids of samples in every space, in the order of the columns; by default chosen by [`select_anchors`].
        routing (`str` or `Callable`, *optional*, defaults to `"average"`):
            See above.
        duplicates (`str`, *optional*, defaults to `"mean"`):
            `"mean"` averages the spaces that make a row; `"first"` takes the one whose task's name sorts first.
        standardize (`bool`, *optional*, defaults to `False`):
            See [`RelativeProjector`].
        chunk_size (`int`, *optional*, defaults to 8192):
            Rows handled at once. Beside the result only such a chunk is held.
        fit_ids (`Sequence`, *optional*):
            Samples of every space that `standardize` takes means and variances from; all by default. Leave out those
            that are scored.
        selection (`Any`):
            For [`select_anchors`]: `num_anchors`, `strategy`, `seed`, `candidates`.

    Returns:
        [`LatentSpace`]: with anchors among its rows; `drop(space.anchors)` leaves them out.

    Raises:
        `KeyError`: for an unknown `routing`, or anchors that a space lacks.
        `ValueError`: for spaces that contradict each other in a label, zero rows, and the like.
    """
    sets = check_sets(sets)
    _check_choices(sets, routing, duplicates, chunk_size)
    if anchors is None:
        anchors = select_anchors(sets, **selection)
    elif selection:
        raise ValueError(f"{', '.join(sorted(selection))}: only for choosing anchors, and anchors are given.")
    projectors = [RelativeProjector(anchors, standardize).fit(entry, fit_ids) for entry in sets]
    # Zero rows are found before any long work.
    for entry in sets if not standardize else []:
        row_norms(entry.embeddings, entry.ids, entry.name)
    ids = reduce(np.union1d, (entry.ids for entry in sets))
    rows = np.stack([positions(entry.ids, ids) for entry in sets], axis=1)
    labels = merged_labels(sets, ids)
    uses = _uses(sets, ids, rows, projectors[0].anchors, routing, chunk_size)
    if duplicates == "first":
        uses &= np.cumsum(uses, axis=1) == 1

    embeddings = torch.empty(len(ids), len(projectors[0].anchors))
    for start in range(0, len(ids), chunk_size):
        part = slice(start, start + chunk_size)
        total = torch.zeros(len(rows[part]), embeddings.shape[1], dtype=torch.float64)
        for number, (entry, projector) in enumerate(zip(sets, projectors, strict=True)):
            used = np.flatnonzero(uses[part, number])
            if len(used):
                found = entry.embeddings[torch.from_numpy(rows[part, number][used])]
                total.index_add_(0, torch.from_numpy(used), projector.transform(found, chunk_size).double())
        embeddings[part] = total / torch.from_numpy(uses[part].sum(1))[:, None]
    tasks = [entry.task for entry in sets]
    return LatentSpace(ids, embeddings, labels, torch.from_numpy(uses), tasks, projectors[0].anchors)


def _check_choices(sets: Sequence[EmbeddingSet], routing: Any, duplicates: str, chunk_size: int) -> None:
    if not callable(routing):
        if routing not in ROUTINGS:
            raise KeyError(f"Unknown routing {routing!r}; {nearest(str(routing), ROUTINGS)}")
        if routing != "average":
            check_own(sets, routing)
    else:
        check_own(sets, getattr(routing, "__name__", "callable"))
    if duplicates not in DUPLICATES:
        raise KeyError(f"Unknown duplicates {duplicates!r}; known ones are {', '.join(DUPLICATES)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")


def _uses(
    sets: Sequence[EmbeddingSet], ids: np.ndarray, rows: np.ndarray, anchors: np.ndarray, routing: Any, chunk_size: int
) -> np.ndarray:
    """Which spaces make each row, `(N, T)`, bool; at least one does."""
    present = rows >= 0
    if routing == "average":
        return present
    own = np.stack([entry.own.numpy()[rows[:, t]] for t, entry in enumerate(sets)], axis=1) & present
    homeless = ~own.any(1)
    common = homeless & (positions(anchors, ids) >= 0)
    uses = np.where(common[:, None], present, own)
    open_rows = np.flatnonzero(homeless & ~common)
    if routing == "oracle":
        if len(open_rows):
            raise ValueError(
                f"routing='oracle' needs the task of every sample, and no space owns {named(ids[open_rows])}; mark "
                "them in own, or choose another routing."
            )
        return uses
    router = routing if callable(routing) else ROUTERS[routing]
    uses[open_rows, route(sets, rows[open_rows], router, chunk_size)] = True
    return uses
