"""Which space a sample is taken from when nobody says which task it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .relative import unit_rows
from .spaces import UNKNOWN_LABEL, EmbeddingSet


#: How well rows `(n, width)` fit a space, `(n,)`: the highest of all spaces takes the sample.
Scorer = Callable[[Tensor], Tensor]
_NEIGHBOURS = 10


def knn(own: EmbeddingSet) -> Scorer:
    """Mean cosine to the ten nearest of the space's own samples."""
    reference = unit_rows(own.embeddings, own.ids, own.name)
    neighbours = min(_NEIGHBOURS, len(own))

    def score(rows: Tensor) -> Tensor:
        return (unit_rows(rows) @ reference.T).topk(neighbours, dim=1).values.double().mean(1)

    return score


def mahalanobis(own: EmbeddingSet) -> Scorer:
    """
    Minus the squared Mahalanobis distance to the nearest class mean of the space's own samples (one mean if they have
    no labels), in units of what these samples have themselves on average.

    The covariance within classes is shrunk by Ledoit and Wolf's rule, so that few samples do.
    """
    from sklearn.covariance import ledoit_wolf

    rows = own.embeddings.double()
    labels = torch.zeros(len(own), dtype=torch.int64) if own.labels is None else own.labels
    classes, index = labels.unique(return_inverse=True)
    means = _class_means(rows, index, len(classes))
    covariance = torch.from_numpy(ledoit_wolf((rows - means[index]).numpy(), assume_centered=True)[0])
    if not bool(covariance.diagonal().sum() > 0):
        raise ValueError(f"{own.name} has no spread around its class means; routing 'mahalanobis' cannot measure it.")
    # Distances in this basis are Mahalanobis distances.
    whiten = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), torch.eye(len(covariance), dtype=torch.float64), upper=False
    ).T
    centres = means @ whiten

    def distance(rows: Tensor) -> Tensor:
        return torch.cdist(rows.double() @ whiten, centres).square().min(1).values

    typical = distance(own.embeddings).mean()
    return lambda rows: -distance(rows) / typical


def confidence(own: EmbeddingSet) -> Scorer:
    """Largest class probability of a logistic regression on the space's own labelled samples."""
    from .classifiers import fit_logistic

    if own.labels is None or len(own.labels.unique()) < 2 or bool((own.labels == UNKNOWN_LABEL).any()):
        raise ValueError(f"Routing 'confidence' needs labels of two or more classes on all own rows of {own.name}.")
    model = fit_logistic(own.embeddings.numpy(), own.labels.numpy())
    return lambda rows: torch.from_numpy(model.predict_proba(rows.numpy()).max(1))


def _class_means(rows: Tensor, index: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, index, rows)
    return sums / index.bincount(minlength=count)[:, None]


ROUTERS: dict[str, Callable[[EmbeddingSet], Scorer]] = {
    "knn": knn,
    "mahalanobis": mahalanobis,
    "confidence": confidence,
}


def check_own(sets: Sequence[EmbeddingSet], routing: str) -> None:
    """Refuses routing that needs to know which samples are a space's own, where this is not known."""
    for entry in sets:
        if entry.own is None or not bool(entry.own.any()):
            raise ValueError(
                f"routing={routing!r} needs the samples that belong to each task, and {entry.name} marks none; give "
                "EmbeddingSet(own=...), or use routing='average'."
            )


def route(
    sets: Sequence[EmbeddingSet],
    rows: np.ndarray,
    router: Callable[[EmbeddingSet], Scorer],
    chunk_size: int,
) -> np.ndarray:
    """
    The space whose scorer likes each sample best.

    Args:
        sets (`Sequence[EmbeddingSet]`):
            T spaces with marks of their own samples.
        rows (`np.ndarray`):
            `(n, T)`: where each sample stands in each space, -1 where it does not.
        router (`Callable`):
            Makes a scorer from a set's own rows.
        chunk_size (`int`):
            Samples handled at once.

    Returns:
        `np.ndarray`: `(n,)`, numbers of spaces; of equals the first.

    Raises:
        `ValueError`: when a scorer returns something else than one number per row.
    """
    best = np.full(len(rows), -np.inf)
    chosen = np.full(len(rows), -1)
    for number, entry in enumerate(sets):
        present = np.flatnonzero(rows[:, number] >= 0)
        if not len(present):
            continue
        score = router(entry.select(entry.ids[entry.own.numpy()]))
        for start in range(0, len(present), chunk_size):
            part = present[start : start + chunk_size]
            values = torch.as_tensor(score(entry.embeddings[torch.from_numpy(rows[part, number])])).double()
            if values.shape != (len(part),) or not bool(values.isfinite().all()):
                raise ValueError(
                    f"Routing gave scores of shape {tuple(values.shape)} for {len(part)} rows of {entry.name}; it must "
                    "give one finite number per row."
                )
            better = values.numpy() > best[part]
            best[part[better]] = values.numpy()[better]
            chosen[part[better]] = number
    return chosen
