from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hf_atm.fewshot import EpisodeEncoder, FewShotConfig


class TinyEncoder(EpisodeEncoder):
    """Two layers over vectors `x`, both conditioned, with dropout."""

    num_film_layers = 2

    def __init__(self, inputs=6, dim=12, dropout=0.0):
        super().__init__()
        self.embedding_dim = dim
        self.first, self.second, self.dropout = nn.Linear(inputs, dim), nn.Linear(dim, dim), nn.Dropout(dropout)

    def forward(self, items, film=None, groups=None):
        hidden = self.dropout(self.apply_film(self.first(items["x"]).relu(), film, 0, groups))
        return self.apply_film(self.second(hidden), film, 1, groups)


class Vectors(list):
    """Rows `{"x": ..., "label": ...}` of the same Gaussian classes, their means `apart` deviations from 0."""

    def __init__(self, classes=5, each=30, inputs=6, apart=8.0, seed=0, shuffled=False):
        means = np.linalg.qr(np.random.default_rng(0).normal(size=(inputs, inputs)))[0][:classes] * apart
        generator = np.random.default_rng(seed)
        labels = np.repeat(np.arange(classes), each)
        x = (means[labels] + generator.normal(size=(len(labels), inputs))).astype(np.float32)
        if shuffled:
            labels = generator.permutation(labels)
        super().__init__(
            {"x": torch.from_numpy(row), "label": int(label)} for row, label in zip(x, labels, strict=True)
        )


def collate(rows):
    assert all(set(row) == {"x"} for row in rows), "labels are no input"
    return {"x": torch.stack([row["x"] for row in rows])}


@pytest.fixture
def settings(tmp_path):
    """Makes a small [`FewShotConfig`]."""

    def make(**changes):
        values = {
            "output_dir": str(tmp_path / "run"),
            "n_way": 3,
            "k_shot": 2,
            "n_query": 4,
            "episodes_per_epoch": 24,
            "eval_episodes": 40,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        return FewShotConfig(**{**values, **changes})

    return make
