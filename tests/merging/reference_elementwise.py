"""Independent float64 references of the elementwise methods: loops over entries, NumPy only; nothing from hf_atm."""

from __future__ import annotations

import math

import numpy as np


def entries(vectors, key):
    """The values of all tasks at each place, in index order."""
    return zip(*(v[key].reshape(-1).astype(np.float64) for v in vectors), strict=True)


def consensus(vectors, weights, thresholds, k):
    merged = {}
    for key in vectors[0]:
        out = []
        for place in entries(vectors, key):
            scaled = [w * x for w, x in zip(weights, place, strict=True)]
            total = sum(scaled)
            needed = [abs(x) > lam * abs(total - x) for x, lam in zip(scaled, thresholds, strict=True)]
            out.append(total if sum(needed) >= k else 0.0)
        merged[key] = np.array(out).reshape(vectors[0][key].shape)
    return merged


def tall(vectors, weights, thresholds, task):
    merged = {}
    for key in vectors[0]:
        out = []
        for place in entries(vectors, key):
            scaled = [w * x for w, x in zip(weights, place, strict=True)]
            total = sum(scaled)
            out.append(total if abs(scaled[task]) > thresholds[task] * abs(total - scaled[task]) else 0.0)
        merged[key] = np.array(out).reshape(vectors[0][key].shape)
    return merged


def magmax(vectors, weights):
    merged = {}
    for key in vectors[0]:
        out = []
        for place in entries(vectors, key):
            best = 0.0
            for w, x in zip(weights, place, strict=True):
                if abs(w * x) >= abs(best):
                    best = w * x
            out.append(best)
        merged[key] = np.array(out).reshape(vectors[0][key].shape)
    return merged


def pcb(vectors, weights, density, tails):
    """One flat vector per task, sorted as a whole."""
    keys = sorted(vectors[0])
    flat = [np.concatenate([v[key].reshape(-1) for key in keys]).astype(np.float64) for v in vectors]
    size, tasks = flat[0].size, len(flat)
    beyond = int(tails * size)
    total = sum(flat)
    numerator, divisor = np.zeros(size), np.zeros(size)
    for weight, tau in zip(weights, flat, strict=True):
        ranked = np.sort(np.abs(tau))
        low, high = ranked[beyond], ranked[size - 1 - beyond]
        clipped = np.clip(np.abs(tau), low, high)
        score = np.exp(tasks * ((clipped - low) / (high - low)) ** 2) * np.tanh(tau * total)
        threshold = np.sort(score)[int((1 - density) * size * (1 + 1e-12))]
        coefficient = (np.clip(score, threshold, None) - threshold) / (score.max() - threshold)
        numerator += weight * coefficient * np.sign(tau) * clipped
        divisor += abs(weight) * coefficient
    out, merged, start = numerator / np.maximum(divisor, 1e-12), {}, 0
    for key in keys:
        shape = vectors[0][key].shape
        merged[key] = out[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return merged


def keep_probabilities(matrix, density, epsilon):
    """DELLA: the probability of every entry of a matrix, row by row, from a stable sort."""
    probabilities = np.empty(matrix.shape)
    for row, values in enumerate(np.abs(matrix.astype(np.float64))):
        for rank, column in enumerate(np.argsort(values, kind="stable")):
            share = rank / (len(values) - 1) if len(values) > 1 else 0.5
            probabilities[row, column] = density - epsilon + 2 * epsilon * share
    return probabilities


def kth_largest(numbers, k):
    ranked = np.sort(numbers)[::-1]
    return ranked[k - 1], k - int((ranked > ranked[k - 1]).sum()), int((ranked == ranked[k - 1]).sum())
