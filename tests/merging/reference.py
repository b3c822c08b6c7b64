"""Independent float64 references of the merge methods: slow, literal, NumPy only; nothing from hf_atm."""

from __future__ import annotations

import numpy as np


def mean(vectors, weights):
    total = sum(weights)
    return {key: sum(w * v[key] for w, v in zip(weights, vectors, strict=True)) / total for key in vectors[0]}


def keep_largest(values, count):
    """Flat mask of the `count` largest magnitudes; stable sorting puts the lowest index first among equals."""
    order = np.argsort(-np.abs(values), kind="stable")
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:count]] = True
    return mask


def ties(vectors, weights, density, scope="model", vote="total", func="mean", weighted_vote=False):
    """Loops over single entries of the concatenated (model) or single (tensor) vectors."""
    keys = sorted(vectors[0])
    blocks = [keys] if scope == "model" else [[key] for key in keys]
    merged = {}
    for block in blocks:
        flat = [np.concatenate([v[key].reshape(-1) for key in block]).astype(np.float64) for v in vectors]
        count = max(1, int(density * flat[0].size * (1 + 1e-12)))
        trimmed = [np.where(keep_largest(x, count), x, 0.0) for x in flat]
        signs = np.zeros(flat[0].size)
        for i in range(signs.size):
            votes = [t[i] if vote == "total" else np.sign(t[i]) for t in trimmed]
            signs[i] = np.sign(sum(v * (w if weighted_vote else 1.0) for v, w in zip(votes, weights, strict=True)))
        majority = 1.0 if signs.sum() >= 0 else -1.0
        signs[signs == 0] = majority
        out = np.zeros(signs.size)
        for i in range(signs.size):
            chosen = [(w, t[i]) for w, t in zip(weights, trimmed, strict=True) if np.sign(t[i]) == signs[i]]
            if not chosen:
                continue
            if func == "max":
                out[i] = max((w * x for w, x in chosen), key=abs)
            else:
                out[i] = sum(w * x for w, x in chosen)
                if func == "mean":
                    out[i] /= sum(abs(w) for w, _ in chosen)
        start = 0
        for key in block:
            size = vectors[0][key].size
            merged[key] = out[start : start + size].reshape(vectors[0][key].shape)
            start += size
    return merged


def breadcrumbs(vectors, weights, density, gamma):
    merged = {}
    for key in vectors[0]:
        size = vectors[0][key].size
        top, kept = int(gamma * size), max(1, int(density * size))
        total = np.zeros(size)
        for weight, vector in zip(weights, vectors, strict=True):
            flat = vector[key].reshape(-1).astype(np.float64)
            order = np.argsort(-np.abs(flat), kind="stable")[top : top + kept]
            total[order] += weight * flat[order]
        merged[key] = (total / sum(weights)).reshape(vectors[0][key].shape)
    return merged


def polar(matrix):
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    return left[:, :rank] @ right[:rank]


def tsv_m(matrices, weights):
    lefts, spectra, rights = [], [], []
    count = max(1, min(matrices[0].shape) // len(matrices))
    for matrix, weight in zip(matrices, weights, strict=True):
        left, values, right = np.linalg.svd(weight * matrix.astype(np.float64), full_matrices=False)
        k = min(count, int((values > 1e-9 * values[0]).sum()))
        lefts.append(left[:, :k])
        spectra.append(values[:k])
        rights.append(right[:k].T)
    return polar(np.hstack(lefts)) @ np.diag(np.concatenate(spectra)) @ polar(np.hstack(rights)).T


def iso_c(matrices, weights, rank):
    total = sum(w * m.astype(np.float64) for w, m in zip(weights, matrices, strict=True))
    left, values, right = np.linalg.svd(total, full_matrices=False)
    return values.sum() / rank * left[:, :rank] @ right[:rank]
