"""Independent float64 references of slerp, the Karcher mean and Model Stock on flat NumPy vectors."""

from __future__ import annotations

import numpy as np


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def slerp(a, b, t):
    if not a.any() or not b.any() or abs(cosine(a, b)) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine(a, b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def log_map(x, u):
    """Tangent vector at x that points to u and is as long as the arc between them."""
    angle = np.arccos(np.clip(x @ u, -1, 1))
    across = u - (x @ u) * x
    length = np.linalg.norm(across)
    return np.zeros_like(x) if length < 1e-14 else angle * across / length


def exp_map(x, v):
    length = np.linalg.norm(v)
    return x if length < 1e-300 else np.cos(length) * x + np.sin(length) * v / length


def karcher(vectors, weights, iterations):
    parts = np.array(weights) / sum(weights)
    units = [v / np.linalg.norm(v) for v in vectors]
    x = sum(p * u for p, u in zip(parts, units, strict=True))
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
        x = exp_map(x, sum(p * log_map(x, u) for p, u in zip(parts, units, strict=True)))
    return x * sum(p * np.linalg.norm(v) for p, v in zip(parts, vectors, strict=True))


def model_stock(vectors, weights):
    count = len(vectors)
    pairs = [cosine(vectors[i], vectors[j]) for i in range(count) for j in range(i)]
    c = min(max(float(np.mean(pairs)), 0.0), 1.0) if pairs else 1.0
    t = count * c / (1 + (count - 1) * c)
    return t * sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)
