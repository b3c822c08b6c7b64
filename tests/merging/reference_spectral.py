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
