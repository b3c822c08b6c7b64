from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.latent import EmbeddingSet


@pytest.fixture
def make_sets():
    """Noisy, rotated, rescaled copies of one space of three classes: {task: ids} says who knows which sample."""

    def make(known, width=12, noise=0.1, seed=0, widths=None):
        generator = np.random.default_rng(seed)
        ids = sorted({sample for part in known.values() for sample in part})
        labels = {sample: number % 3 for number, sample in enumerate(ids)}
        centres = generator.normal(size=(3, width)) * 2
        planted = {sample: centres[labels[sample]] + generator.normal(size=width) for sample in ids}
        sets = []
        for number, (task, part) in enumerate(known.items()):
            wide = width if widths is None else widths[number]
            turn = np.linalg.qr(generator.normal(size=(max(wide, width),) * 2))[0][:width, :wide]
            rows = np.array([planted[s] for s in part]) + noise * generator.normal(size=(len(part), width))
            classes = torch.tensor([labels[s] for s in part])
            sets.append(EmbeddingSet(task, part, torch.tensor(rows @ turn * 10.0 ** (number - 1)), classes))
        return sets, planted

    return make


def as_dicts(sets):
    """What the reference takes."""
    return {s.task: dict(zip(s.ids.tolist(), s.embeddings.double().numpy(), strict=True)) for s in sets}
