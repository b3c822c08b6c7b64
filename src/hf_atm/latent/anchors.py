"""Which samples become anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..merging.tensors import nearest
from ..seeding import derive_seed
from .ids import as_ids, named, positions
from .relative import unit_rows
from .spaces import UNKNOWN_LABEL, EmbeddingSet, check_sets, merged_labels


def select_anchors(
    sets: Sequence[EmbeddingSet],
    num_anchors: int = 256,
    strategy: str = "random",
    seed: int = 0,
    candidates: Any = None,
) -> list[Any]:
    """
    Chooses anchors among the samples that all spaces share. They should be training samples, and not be evaluated on.

    Args:
        sets (`Sequence[EmbeddingSet]`):
            The spaces.
        num_anchors (`int`, *optional*, defaults to 256):
            How many, at least 2. Far fewer than the spaces are wide lose information.
        strategy (`str`, *optional*, defaults to `"random"`):
            `"random"`; `"balanced"`, equally many per class as far as there are; `"farthest"`, greedily the sample
            whose largest cosine to the anchors so far is smallest; `"kmeans"`, the samples nearest to the centres of
            as many clusters. The last two look at all spaces side by side, each scaled to unit rows.
        seed (`int`, *optional*, defaults to 0):
            Decides the random choices; not those of other strategies but the first anchor of `"farthest"` and where
            clusters start.
        candidates (`Sequence`, *optional*):
            Choose among these ids only.

    Returns:
        `list`: the ids, sorted; under `"farthest"` in the order of choice, so that its first m are the best m.

    Raises:
        `KeyError`: for an unknown strategy, or candidates that a space lacks.
        `ValueError`: for fewer than two anchors or more than there are candidates.
    """
    sets = check_sets(sets)
    if strategy not in STRATEGIES:
        raise KeyError(f"Unknown strategy {strategy!r}; {nearest(strategy, list(STRATEGIES))}")
    if num_anchors < 2:
        raise ValueError(f"num_anchors is {num_anchors}; relative coordinates need at least two.")
    if candidates is None:
        ids = reduce(np.intersect1d, (entry.ids for entry in sets))
    else:
        ids = np.unique(as_ids(candidates, "candidates"))
        for entry in sets:
            entry.positions(ids)
    if len(ids) < num_anchors:
        raise ValueError(
            f"num_anchors is {num_anchors}, but the spaces share {len(ids)} samples to choose from; lower it, or embed "
            "more common samples."
        )
    generator = np.random.default_rng(derive_seed("anchors", strategy, seed))
    chosen = STRATEGIES[strategy](sets, ids, num_anchors, generator)
    return ids[chosen if strategy == "farthest" else np.sort(chosen)].tolist()


def _random(sets: Sequence[EmbeddingSet], ids: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(len(ids))[:count]


def _balanced(sets: Sequence[EmbeddingSet], ids: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    labels = merged_labels(sets, ids)
    if labels is None or bool((labels == UNKNOWN_LABEL).any()):
        wrong = ids if labels is None else ids[(labels == UNKNOWN_LABEL).numpy()]
        raise ValueError(f"Balanced anchors need labels, and no space has one for {named(wrong)}.")
    order = generator.permutation(len(ids))
    of_class = labels.numpy()[order]
    # How many of its class come before each sample: taking the lowest first goes around the classes.
    turn = np.zeros(len(ids), dtype=np.int64)
    for label in np.unique(of_class):
        turn[of_class == label] = np.arange((of_class == label).sum())
    return order[np.argsort(turn, kind="stable")[:count]]


def _directions(sets: Sequence[EmbeddingSet], ids: np.ndarray) -> list[Tensor]:
    return [unit_rows(e.embeddings[torch.from_numpy(positions(e.ids, ids))], ids, e.name) for e in sets]


def _farthest(sets: Sequence[EmbeddingSet], ids: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    spaces = _directions(sets, ids)
    chosen = [int(generator.integers(len(ids)))]
    closest = torch.full((len(ids),), -float("inf"), dtype=torch.float64)
    while len(chosen) < count:
        last = chosen[-1]
        closest = torch.maximum(closest, sum((s @ s[last]).double() for s in spaces))  # type: ignore[arg-type]
        closest[last] = float("inf")
        chosen.append(int(closest.argmin()))
    return np.array(chosen)


def _kmeans(sets: Sequence[EmbeddingSet], ids: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    from sklearn.cluster import KMeans

    rows = torch.cat(_directions(sets, ids), dim=1).numpy()
    # Sums over clusters depend on the number of threads.
    with threadpool_limits(1):
        centres = KMeans(count, n_init=1, random_state=int(generator.integers(2**31))).fit(rows).cluster_centers_
    distances = torch.cdist(torch.from_numpy(centres), torch.from_numpy(rows))
    chosen: list[int] = []
    for row in distances:
        row[chosen] = float("inf")
        chosen.append(int(row.argmin()))
    return np.array(chosen)


STRATEGIES: dict[str, Callable[..., np.ndarray]] = {
    "random": _random,
    "balanced": _balanced,
    "farthest": _farthest,
    "kmeans": _kmeans,
}
