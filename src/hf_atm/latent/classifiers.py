"""How well classes can be read off a space: centroids, neighbours, probes. Rows to fit on, rows to score."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .spaces import UNKNOWN_LABEL


def centroid_accuracy(embeddings: Any, labels: Any, test_embeddings: Any, test_labels: Any) -> float:
    """
    Accuracy of taking the class with the nearest mean, in Euclidean distance.

    Args:
        embeddings (`Tensor`):
            `(N, d)`, the samples that give the means.
        labels (`Tensor`):
            `(N,)`, their classes, at least two.
        test_embeddings (`Tensor`):
            `(M, d)`, the samples that are scored.
        test_labels (`Tensor`):
            `(M,)`, their classes.

    Returns:
        `float`: within [0, 1].

    Raises:
        `ValueError`: when shapes do not fit, a label is unknown (-1), or there is one class only.
    """
    from sklearn.neighbors import NearestCentroid

    return _accuracy(NearestCentroid(), embeddings, labels, test_embeddings, test_labels)


def knn_accuracy(
    embeddings: Any, labels: Any, test_embeddings: Any, test_labels: Any, k: int = 10, metric: str = "euclidean"
) -> float:
    """
    Accuracy of the majority among the `k` nearest neighbours.

    Args:
        embeddings, labels, test_embeddings, test_labels:
            See [`centroid_accuracy`].
        k (`int`, *optional*, defaults to 10):
            Neighbours; all rows if there are fewer.
        metric (`str`, *optional*, defaults to `"euclidean"`):
            Any of scikit-learn's, such as `"cosine"`.

    Returns:
        `float`: within [0, 1].
    """
    from sklearn.neighbors import KNeighborsClassifier

    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    model = KNeighborsClassifier(min(k, len(labels)), metric=metric)
    return _accuracy(model, embeddings, labels, test_embeddings, test_labels)


def linear_probe(
    embeddings: Any,
    labels: Any,
    test_embeddings: Any,
    test_labels: Any,
    head: str = "logistic",
    seed: int = 0,
    max_iter: int = 300,
) -> float:
    """
    Accuracy of a classifier trained on a frozen space.

    Args:
        embeddings, labels, test_embeddings, test_labels:
            See [`centroid_accuracy`].
        head (`str`, *optional*, defaults to `"logistic"`):
            `"logistic"`, logistic regression on standardised dimensions; `"mlp"`, the probe of the paper: every row to
            mean 0 and variance 1, a hidden layer of 256 with ReLU, Adam at 1e-3, batches of 128, stopped early.
        seed (`int`, *optional*, defaults to 0):
            Decides the MLP's start, batches and validation rows.
        max_iter (`int`, *optional*, defaults to 300):
            Iterations, or epochs of the MLP, at most.

    Returns:
        `float`: within [0, 1].
    """
    from sklearn.neural_network import MLPClassifier

    if head not in ("logistic", "mlp"):
        raise KeyError(f"Unknown head {head!r}; known ones are logistic, mlp.")
    if head == "logistic":
        return _accuracy(logistic(max_iter), embeddings, labels, test_embeddings, test_labels)
    model = MLPClassifier(
        (256,), learning_rate_init=1e-3, batch_size=128, early_stopping=True, max_iter=max_iter, random_state=seed
    )
    rows, tests = (_standardised_rows(np.asarray(part)) for part in (embeddings, test_embeddings))
    return _accuracy(model, rows, labels, tests, test_labels)


def logistic(max_iter: int = 300) -> Any:
    """Logistic regression on standardised dimensions, not fitted yet."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter))


def fit_logistic(embeddings: np.ndarray, labels: np.ndarray) -> Any:
    """Logistic regression fitted on standardised dimensions, in float64."""
    return _fitted(logistic(), embeddings.astype(np.float64), labels)


def _fitted(model: Any, rows: np.ndarray, labels: np.ndarray) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # A bound on the iterations is asked for; reaching it is no news.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(rows, labels)


def _standardised_rows(rows: np.ndarray) -> np.ndarray:
    deviation = rows.std(1, keepdims=True)
    return (rows - rows.mean(1, keepdims=True)) / np.where(deviation > 0, deviation, 1)


def _accuracy(model: Any, rows: Any, labels: Any, test_rows: Any, test_labels: Any) -> float:
    rows, labels = check_labelled(rows, labels, "the rows to fit on")
    test_rows, test_labels = check_labelled(test_rows, test_labels, "the rows to score")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"All {len(labels)} rows to fit on are of one class; a classifier needs two.")
    if rows.shape[1] != test_rows.shape[1]:
        raise ValueError(f"The rows to fit on are {rows.shape[1]} wide and those to score {test_rows.shape[1]}.")
    return float((_fitted(model, rows, labels).predict(test_rows) == test_labels).mean())


def check_labelled(embeddings: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as float64 and labels as int64, refused when they do not fit or a class is unknown."""
    rows = torch.as_tensor(embeddings).detach().cpu().double().numpy()
    classes = torch.as_tensor(labels).detach().cpu().numpy()
    if rows.ndim != 2 or classes.shape != (len(rows),) or not len(rows):
        raise ValueError(f"{name} have shape {rows.shape} and their labels {classes.shape}; give one label per row.")
    if (classes == UNKNOWN_LABEL).any():
        raise ValueError(f"{name} include some without a class (-1); select labelled rows first.")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} have entries that are not finite.")
    return rows, classes
