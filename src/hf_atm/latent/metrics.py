"""How alike two spaces are, and how far apart classes lie in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..seeding import derive_seed
from .classifiers import centroid_accuracy, check_labelled, knn_accuracy, linear_probe
from .ids import as_ids, named
from .relative import CHUNK
from .spaces import UNKNOWN_LABEL, EmbeddingSet, LatentSpace


def linear_cka(x: Tensor, y: Tensor, chunk_size: int = CHUNK) -> float:
    """
    Linear centred kernel alignment, `|X'Y|^2 / (|X'X| |Y'Y|)` of centred columns, in Frobenius norms
    (https://huggingface.co/papers/1905.00414).

    It is 1 for spaces that differ by a rotation and a scale. Everything is summed in float64; memory grows with the
    squared widths, not with the number of rows.

    Args:
        x (`Tensor`):
            `(N, d)`.
        y (`Tensor`):
            `(N, d')`, of the same samples in the same order.
        chunk_size (`int`, *optional*, defaults to 8192):
            Rows handled at once.

    Returns:
        `float`: within [0, 1].

    Raises:
        `ValueError`: for different numbers of rows, fewer than two, or a space whose rows are all equal.
    """
    x, y = torch.as_tensor(x).detach().cpu(), torch.as_tensor(y).detach().cpu()
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"CKA compares two spaces of the same samples, at least two, not shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    means = [torch.mean(part, dim=0, dtype=torch.float64) for part in (x, y)]
    widths = (x.shape[1], y.shape[1])
    xx, yy, xy = (
        torch.zeros(a, b, dtype=torch.float64)
        for a, b in ((widths[0], widths[0]), (widths[1], widths[1]), (widths[0], widths[1]))
    )
    for start in range(0, len(x), chunk_size):
        a, b = (part[start : start + chunk_size].double() - mean for part, mean in zip((x, y), means, strict=True))
        xx.addmm_(a.T, a)
        yy.addmm_(b.T, b)
        xy.addmm_(a.T, b)
    scale = float(torch.linalg.matrix_norm(xx) * torch.linalg.matrix_norm(yy))
    if not scale > 0:
        raise ValueError("CKA means nothing for a space whose rows are all equal (or not finite).")
    return min(1.0, float(xy.square().sum()) / scale)


def separability(embeddings: Tensor, labels: Tensor) -> float:
    """
    Distance between class means over the classes' own spread, mean over pairs of classes: how far apart classes lie.

    For each ordered pair, the distance of the two means is divided by half the sum of the classes' mean distances to
    their own mean (https://huggingface.co/papers/2311.06547).

    Args:
        embeddings (`Tensor`):
            `(N, d)`.
        labels (`Tensor`):
            `(N,)`, at least two classes.

    Returns:
        `float`: at least 0, without unit.

    Raises:
        `ValueError`: for a single class, or two classes that both have no spread, such as one sample each.
    """
    rows, classes = (torch.from_numpy(part) for part in check_labelled(embeddings, labels, "the rows"))
    names, index, counts = classes.unique(return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError("Separability needs at least two classes.")
    means = torch.zeros(len(names), rows.shape[1], dtype=torch.float64).index_add_(0, index, rows) / counts[:, None]
    distances = torch.linalg.vector_norm(rows - means[index], dim=1)
    spread = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, distances) / counts
    if int((spread == 0).sum()) > 1:
        raise ValueError(
            f"The classes {names[spread == 0].tolist()[:5]} have no spread; separability needs several different "
            "samples of a class."
        )
    # Not by inner products, which lose the digits of close means.
    between = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    ratios = between / ((spread[:, None] + spread[None, :]) / 2)
    return float(ratios[~torch.eye(len(names), dtype=torch.bool)].mean())


def split_ids(ids: Any, test_size: float = 0.2, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """
    Splits samples, not rows, so that no copy of a test sample is trained on.

    Args:
        ids (`Sequence`):
            The ids; their order does not matter.
        test_size (`float`, *optional*, defaults to 0.2):
            Share of test samples, in (0, 1).
        seed (`int`, *optional*, defaults to 0):
            Decides the choice.

    Returns:
        `tuple[list, list]`: sorted ids to fit on and ids to score, at least one of each.
    """
    ids = np.unique(as_ids(ids))
    if not 0 < test_size < 1 or len(ids) < 2:
        raise ValueError(f"test_size={test_size} of {len(ids)} samples leaves nothing on one side.")
    count = min(max(1, round(test_size * len(ids))), len(ids) - 1)
    order = np.random.default_rng(derive_seed("split", seed)).permutation(len(ids))
    return ids[np.sort(order[count:])].tolist(), ids[np.sort(order[:count])].tolist()


def compare_spaces(
    a: EmbeddingSet | LatentSpace,
    b: EmbeddingSet | LatentSpace,
    labels: Mapping[Any, int] | None = None,
    test_size: float = 0.2,
    seed: int = 0,
) -> dict[str, float]:
    """
    Compares two spaces on the samples they share, row by row as ids say.

    Args:
        a, b ([`EmbeddingSet`] or [`LatentSpace`]):
            The spaces, of any widths. Leave anchors out with `drop`.
        labels (`Mapping`, *optional*):
            Class by id; by default those that the spaces carry.
        test_size (`float`, *optional*, defaults to 0.2), seed (`int`, *optional*, defaults to 0):
            See [`split_ids`]; both spaces are split alike.

    Returns:
        `dict[str, float]`: `rows`, `cka`, and with labels of two classes or more `separability_a`,
        `centroid_accuracy_a`, `knn_accuracy_a`, `linear_probe_a`, and the same of `b`.

    Raises:
        `KeyError`: when `labels` lacks a sample.
        `ValueError`: when the spaces share fewer than two samples, or disagree about a class.
    """
    ids = np.intersect1d(a.ids, b.ids) if a.ids.dtype.kind == b.ids.dtype.kind else a.ids[:0]
    if len(ids) < 2:
        raise ValueError(f"The two spaces share {len(ids)} samples; a comparison needs at least two.")
    spaces = {"a": a.select(ids), "b": b.select(ids)}
    result: dict[str, float] = {
        "rows": len(ids),
        "cka": linear_cka(spaces["a"].embeddings, spaces["b"].embeddings),
    }
    classes = _classes(spaces, ids, labels)
    if classes is None or len(classes.unique()) < 2:
        return result
    fit, score = split_ids(ids, test_size, seed)
    for name, space in spaces.items():
        result[f"separability_{name}"] = separability(space.embeddings, classes)
        fit_rows, score_rows = (torch.from_numpy(space.positions(part)) for part in (fit, score))
        arguments = [t[rows] for rows in (fit_rows, score_rows) for t in (space.embeddings, classes)]
        for measure in (centroid_accuracy, knn_accuracy, linear_probe):
            result[f"{measure.__name__}_{name}"] = measure(*arguments)
    return result


def _classes(spaces: Mapping[str, Any], ids: np.ndarray, labels: Mapping[Any, int] | None) -> Tensor | None:
    if labels is not None:
        missing = [name for name in ids.tolist() if name not in labels]
        if missing:
            raise KeyError(f"labels lacks the samples {named(missing)}; give every shared sample a class.")
        return torch.tensor([int(labels[name]) for name in ids.tolist()])
    given = [space.labels for space in spaces.values() if space.labels is not None]
    if not given:
        return None
    if len(given) == 2:
        differ = (given[0] != given[1]) & (given[0] != UNKNOWN_LABEL) & (given[1] != UNKNOWN_LABEL)
        if bool(differ.any()):
            raise ValueError(
                f"The two spaces give the sample {ids[differ.numpy()][0].item()!r} different labels; name classes alike."
            )
        given[0] = torch.where(given[0] == UNKNOWN_LABEL, given[1], given[0])
    return given[0]
