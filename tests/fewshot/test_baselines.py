"""Baselines: a frozen classifier and plain statistics of graphs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_atm.fewshot import (
    GraphDataset,
    evaluate_episodes,
    finetune_baseline,
    node_statistics,
    probe_episodes,
)

from .conftest import TinyEncoder, Vectors, collate
from .test_graphs import random_graphs


def test_a_probe_separates_what_can_be_separated_and_stays_at_chance_else():
    data = Vectors()
    features = np.stack([row["x"].numpy() for row in data])
    labels = [row["label"] for row in data]
    assert probe_episodes(features, labels, 3, 4, 5, 50)["accuracy"] > 0.99
    result = probe_episodes(features, np.random.default_rng(0).permutation(labels), 3, 4, 5, 400)
    assert abs(result["accuracy"] - 1 / 3) < 3 / 1.96 * result["ci95"]


def test_the_classifier_is_trained_on_base_classes_and_its_encoder_copied(settings):
    torch.manual_seed(0)
    encoder = TinyEncoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    base = [0, 1, 4]
    train, test = Vectors(), Vectors(seed=5)
    scores = finetune_baseline(
        encoder, settings(n_way=2), train, test, collate, train_classes=base, test_classes=[2, 3], num_episodes=60
    )
    assert scores["accuracy"] > 0.8 and set(scores) == {"accuracy", "ci95", "macro_f1"}
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    with pytest.raises(ValueError, match="episodes of 2 classes need 2"):
        finetune_baseline(encoder, settings(n_way=2), train, test, collate, test_classes=[2], num_episodes=2)


def test_the_classifier_needs_embeddings_of_samples(settings):
    encoder = TinyEncoder()
    encoder.per_episode = True
    with pytest.raises(ValueError, match="a classifier needs one"):
        finetune_baseline(encoder, settings(), Vectors(), Vectors(), collate)


def test_both_draw_the_same_episodes():
    # One dimension, one sample per class, no spread: prototypes and probe then decide alike.
    data = [{"x": torch.tensor([float(label)]), "label": label} for label in range(4) for _ in range(3)]
    first = probe_episodes(np.array([[row["x"].item()] for row in data]), [r["label"] for r in data], 2, 1, 1, 20)
    model = _identity()
    second = evaluate_episodes(model, data, 2, 1, 1, 20, item_collator=collate)
    assert first["accuracy"] == second["accuracy"] == 1.0


def _identity():
    from hf_atm.fewshot import EpisodeEncoder, FewShotModel

    class Identity(EpisodeEncoder):
        embedding_dim = 1

        def forward(self, items, film=None, groups=None):
            return items["x"]

    return FewShotModel.from_encoder(Identity())


def test_statistics_of_graphs_equal_brute_force():
    sizes, edges, labels, _ = random_graphs(20, most=8)
    dataset = GraphDataset(sizes, edges, labels)
    result = node_statistics(dataset, max_degree=5, eigenvalues=3)
    assert result.shape == (20, 4 + 6 + 6)
    plain = node_statistics(dataset, max_degree=5, eigenvalues=0, triangles=False)
    assert np.array_equal(plain, result[:, [0, 1, 4, 5, 6, 7, 8, 9]])
    for row, (size, edge) in enumerate(zip(sizes, edges, strict=True)):
        adjacency = np.zeros((size, size))
        adjacency[edge[0], edge[1]] = 1
        triples = list(itertools.combinations(range(size), 3))
        triangles = sum(adjacency[a, b] * adjacency[b, c] * adjacency[a, c] for a, b, c in triples)
        degrees = adjacency.sum(0)
        paths = sum(d * (d - 1) / 2 for d in degrees)
        assert result[row, :3] == pytest.approx([size, adjacency.sum() / 2, triangles])
        assert result[row, 3] == pytest.approx(3 * triangles / paths if paths else 0)
        assert result[row, 4:10] == pytest.approx([np.mean(np.minimum(degrees, 5) == d) for d in range(6)])
        values = sorted(np.linalg.eigvalsh(adjacency), reverse=True)[:3]
        assert result[row, 10 : 10 + len(values)] == pytest.approx(values, abs=1e-9)
        root = np.diag([d**-0.5 if d else 0 for d in degrees])
        values = sorted(np.linalg.eigvalsh(np.diag(degrees > 0) - root @ adjacency @ root), reverse=True)[:3]
        assert result[row, 13 : 13 + len(values)] == pytest.approx(values, abs=1e-9)
