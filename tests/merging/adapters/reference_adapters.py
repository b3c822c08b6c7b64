"""What merged adapters must be, written down densely in float64 NumPy."""

from __future__ import annotations

import numpy as np


def update(a, b, alpha, rsLoRA=False):
    """One module's true update s B A, (out, in)."""
    rank = a.shape[0]
    return alpha / (np.sqrt(rank) if rsLoRA else rank) * b.astype(np.float64) @ a.astype(np.float64)


def weighted_sum(updates, weights):
    return sum(w * u for w, u in zip(weights, updates, strict=True))


def truncate(matrix, rank):
    """Best approximation of a rank, and the share of the energy it loses."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    best = left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]
    return best, (values[rank:] ** 2).sum() / (values**2).sum()


def bases(updates):
    """Left singular vectors of the updates side by side, right ones of the updates on top of each other."""
    left, values, _ = np.linalg.svd(np.hstack(updates), full_matrices=False)
    left = left[:, values > 1e-6 * values[0]]
    _, values, right = np.linalg.svd(np.vstack(updates), full_matrices=False)
    right = right[values > 1e-6 * values[0]].T
    return _positive(left), _positive(right)


def _positive(columns):
    """Every column with a positive entry of largest magnitude."""
    largest = np.abs(columns).argmax(axis=0)
    return columns * np.sign(columns[largest, np.arange(columns.shape[1])])


def in_core_space(updates, weights, rule):
    """`rule(list of list of cores, weights) -> list of cores`, over all modules at once; lifted."""
    pairs = [bases(module) for module in updates]
    cores = [[left.T @ task @ right for task in module] for module, (left, right) in zip(updates, pairs, strict=True)]
    merged = rule(cores, weights)
    return [left @ core @ right.T for core, (left, right) in zip(merged, pairs, strict=True)]


def in_knots_space(updates, weights, rule):
    """One SVD of the updates side by side; the rule sees each task's part of the right singular vectors."""
    lifted, parts = [], []
    for module in updates:
        left, values, right = np.linalg.svd(np.hstack(module), full_matrices=False)
        keep = values > 1e-6 * values[0]
        lifted.append(left[:, keep] * values[keep])
        parts.append(np.split(right[keep], len(module), axis=1))
    merged = rule(parts, weights)
    return [left @ part for left, part in zip(lifted, merged, strict=True)]


def norm_scale(updates, merged):
    """Root mean square of the tasks' norms over the merged norm; modules outside, tasks inside."""
    tasks = [np.sqrt(sum((module[t] ** 2).sum() for module in updates)) for t in range(len(updates[0]))]
    return np.sqrt(np.mean(np.square(tasks))) / np.sqrt(sum((m**2).sum() for m in merged))
