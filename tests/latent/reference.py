"""Plain float64 NumPy for latent spaces; nothing from hf_atm."""

from __future__ import annotations

import numpy as np


def relative(embeddings, anchors):
    """Cosine of every row to every anchor, one at a time."""
    result = np.zeros((len(embeddings), len(anchors)))
    for i, x in enumerate(np.asarray(embeddings, dtype=np.float64)):
        for j, a in enumerate(np.asarray(anchors, dtype=np.float64)):
            result[i, j] = x @ a / np.sqrt(x @ x) / np.sqrt(a @ a)
    return result


def aggregate(spaces, anchors, uses=None):
    """Sorted ids and the mean row of each.

    `spaces` holds {task: {id: vector}}; `uses(id, tasks)` says which of the tasks that know an id count.
    """
    rows = {}
    for task in sorted(spaces):
        space = spaces[task]
        names = sorted(space)
        projected = relative([space[i] for i in names], [space[a] for a in anchors])
        for i, row in zip(names, projected, strict=True):
            rows.setdefault(i, {})[task] = row
    ids = sorted(rows)
    kept = {i: (uses(i, rows[i]) if uses else list(rows[i])) for i in ids}
    return ids, np.array([np.mean([rows[i][task] for task in kept[i]], axis=0) for i in ids])


def gram_cka(x, y):
    """Linear CKA from centred Gram matrices (Kornblith et al., 2019)."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def separability(x, labels):
    x, labels = np.asarray(x, dtype=np.float64), np.asarray(labels)
    classes = sorted(set(labels.tolist()))
    centre = {c: x[labels == c].mean(0) for c in classes}
    spread = {c: np.mean([np.linalg.norm(row - centre[c]) for row in x[labels == c]]) for c in classes}
    pairs = [
        np.linalg.norm(centre[a] - centre[b]) / (0.5 * (spread[a] + spread[b]))
        for a in classes
        for b in classes
        if a != b
    ]
    return float(np.mean(pairs))


def centroid_accuracy(x, labels, test, test_labels):
    x, labels = np.asarray(x, dtype=np.float64), np.asarray(labels)
    classes = sorted(set(labels.tolist()))
    centres = [x[labels == c].mean(0) for c in classes]
    found = [classes[int(np.argmin([np.linalg.norm(row - m) for m in centres]))] for row in np.asarray(test)]
    return float(np.mean([a == b for a, b in zip(found, list(test_labels), strict=True)]))


def nearest_accuracy(x, labels, test, test_labels):
    """Accuracy of the single nearest neighbour."""
    x = np.asarray(x, dtype=np.float64)
    found = [labels[int(np.argmin([np.linalg.norm(row - other) for other in x]))] for row in np.asarray(test)]
    return float(np.mean([a == b for a, b in zip(found, list(test_labels), strict=True)]))


def farthest(x, first, count):
    """Greedy: always the row whose largest cosine to those chosen is smallest."""
    cosines = relative(x, x)
    chosen = [first]
    while len(chosen) < count:
        closest = [max(cosines[i, j] for j in chosen) if i not in chosen else np.inf for i in range(len(x))]
        chosen.append(int(np.argmin(closest)))
    return chosen


def top_cosine(x, own, k=10):
    """Mean of the k largest cosines of each row to a task's own rows."""
    return np.sort(relative(x, own), axis=1)[:, -k:].mean(1)


def mahalanobis(x, own, labels, covariance):
    """Squared distance to the nearest class mean, over the mean such distance of the task's own rows."""
    own, labels = np.asarray(own, dtype=np.float64), np.asarray(labels)
    inverse = np.linalg.inv(covariance)
    means = [own[labels == c].mean(0) for c in sorted(set(labels.tolist()))]

    def distance(row):
        return min((row - m) @ inverse @ (row - m) for m in means)

    return np.array([distance(row) for row in np.asarray(x, dtype=np.float64)]) / np.mean([distance(r) for r in own])
