"""Independent float64 references of the Gram family in NumPy: explicit normal equations, a flow integrated in steps."""

from __future__ import annotations

import numpy as np


def interference(tau, tasks):
    """WUDI's loss: how much the merged matrix differs from each task in the directions of that task's rows."""
    return sum(np.sum(((tau - t) @ t.T) ** 2) / np.sum(t**2) for t in tasks if t.any())


def interference_gradient(tau, tasks):
    return sum((tau - t) @ (t.T @ t) / np.sum(t**2) for t in tasks if t.any())


def gram_sum(tasks):
    return sum(t.T @ t / np.sum(t**2) for t in tasks if t.any())


def wudi(tasks):
    """The minimiser of the loss that is closest to the sum."""
    total = sum(tasks)
    return total - interference_gradient(total, tasks) @ np.linalg.pinv(gram_sum(tasks), rcond=1e-7)


def flow(tasks, time, steps=2000):
    """Gradient flow of half the loss from the sum on, by the classical Runge-Kutta method."""
    tau, h = sum(tasks), time / steps
    for _ in range(steps):
        k1 = -interference_gradient(tau, tasks)
        k2 = -interference_gradient(tau + h / 2 * k1, tasks)
        k3 = -interference_gradient(tau + h / 2 * k2, tasks)
        k4 = -interference_gradient(tau + h * k3, tasks)
        tau = tau + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return tau


def swudi(tasks, time, rank):
    """Direction by direction of the Gram matrix, the strongest first."""
    total = sum(tasks)
    values, vectors = np.linalg.eigh(gram_sum(tasks))
    result = total.copy()
    for k in range(1, rank + 1):
        value, vector = values[-k], vectors[:, -k]
        share = 1.0 if np.isinf(time) else 1 - np.exp(-time * value)
        result -= share / value * np.outer(interference_gradient(total, tasks) @ vector, vector)
    return result


def regmean(models, grams, shares, a):
    """The authors' closed form; needs invertible Gram matrices."""
    numerator, denominator = 0.0, 0.0
    for model, gram, share in zip(models, grams, shares, strict=True):
        scaled = share * (a * gram + (1 - a) * np.diag(np.diag(gram)))
        numerator, denominator = numerator + model @ scaled, denominator + scaled
    return np.linalg.solve(denominator.T, numerator.T).T


def fisher(models, diagonals, weights):
    """`models` and `diagonals`: T mappings from name to array."""
    norms = [np.sqrt(sum(np.sum(f**2) for f in mapping.values())) for mapping in diagonals]
    merged = {}
    for key in models[0]:
        factors = [w * (f[key] / n + 1e-6) for w, f, n in zip(weights, diagonals, norms, strict=True)]
        merged[key] = sum(f * m[key] for f, m in zip(factors, models, strict=True)) / sum(factors)
    return merged
