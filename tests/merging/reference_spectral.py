"""Independent float64 references of spectral merges and post-processors: literal, NumPy only; nothing from hf_atm."""

from __future__ import annotations

import numpy as np

from .reference import polar


def iso_cts(matrices, weights, fraction):
    """`matrices` of full rank, rows for outputs."""
    matrices = [w * m.astype(np.float64) for w, m in zip(weights, matrices, strict=True)]
    rank, count = min(matrices[0].shape), len(matrices)
    specific = round((rank - int(fraction * rank)) / count)
    common = rank - count * specific
    left, values, right = np.linalg.svd(sum(matrices), full_matrices=False)
    lefts, spectra, rights = [left[:, :common]], [values[:common]], [right[:common].T]
    projector = np.eye(len(left)) - left[:, :common] @ left[:, :common].T
    for matrix in matrices:
        u, s, v = np.linalg.svd(projector @ matrix, full_matrices=False)
        lefts.append(u[:, :specific])
        spectra.append(s[:specific])
        rights.append(v[:specific].T)
    mean = np.concatenate(spectra).mean()
    return mean * polar(np.hstack(lefts)) @ polar(np.hstack(rights)).T


def opcm(vectors, alpha):
    """The recurrence as the paper has it, over whole models and with the factors lambda_t of every step."""

    def norm(vector):
        return np.sqrt(sum((tensor**2).sum() for tensor in vector.values()))

    vectors = [{key: tensor.astype(np.float64) for key, tensor in vector.items()} for vector in vectors]
    merged, previous = vectors[0], 1.0
    for step, vector in enumerate(vectors[1:], start=2):
        total = {}
        for key, delta in vector.items():
            if delta.ndim == 2:
                left, values, right = np.linalg.svd(merged[key])
                projected = left.T @ delta @ right.T
                np.fill_diagonal(projected, 0)
                split = int(np.argmax(np.cumsum(values) / values.sum() > alpha))
                projected[:split, :split] = 0
                delta = left @ projected @ right
            total[key] = previous * merged[key] + delta
        factor = norm(total) / np.mean([norm(v) for v in vectors[:step]])
        merged, previous = {key: tensor / factor for key, tensor in total.items()}, factor
    return merged


def svc(merged, matrices, alpha):
    """Calibrates one matrix direction by direction."""
    left, values, right = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
    result = np.zeros(merged.shape)
    for i in range(len(values)):
        response = left[:, i] @ merged
        scores = []
        for matrix in matrices:
            own = left[:, i] @ matrix
            if own @ own > 0:
                scores.append(max(alpha, response @ own / (own @ own)))
        factor = len(scores) / sum(scores) if scores else 1.0
        result += factor * values[i] * np.outer(left[:, i], right[i])
    return result
