from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.latent import (
    EmbeddingSet,
    LatentSpace,
    centroid_accuracy,
    compare_spaces,
    knn_accuracy,
    linear_cka,
    linear_probe,
    separability,
    split_ids,
)

from . import reference


@pytest.fixture
def space():
    """80 rows of four overlapping classes, float64."""
    labels = torch.arange(80) % 4
    return torch.randn(4, 6, dtype=torch.float64)[labels] + 0.8 * torch.randn(80, 6, dtype=torch.float64), labels


def test_cka_is_one_on_itself_and_blind_to_rotation_and_scale(space):
    x, _ = space
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, 1e4 * x @ turn + 50) == pytest.approx(1, abs=1e-10)
    y = torch.randn(80, 9, dtype=torch.float64)
    assert linear_cka(x, y) == pytest.approx(linear_cka(3 * x @ turn, y), abs=1e-12)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)


def test_feature_form_equals_gram_form(space):
    x, _ = space
    for y in (torch.randn(80, 9), x @ torch.randn(6, 3, dtype=torch.float64), x[:, :1]):
        for size in (7, 8192):
            assert linear_cka(x, y, chunk_size=size) == pytest.approx(reference.gram_cka(x, y), abs=1e-6)


def test_cka_keeps_its_digits_far_from_the_origin(space):
    x, _ = space
    far = (x + 1000).float()
    assert linear_cka(far, x) == pytest.approx(reference.gram_cka(far, x), abs=1e-6)
    assert linear_cka(far, x) > 0.999


def test_separability_is_the_mean_over_pairs_of_classes(space):
    x, labels = space
    assert separability(x, labels) == pytest.approx(reference.separability(x, labels), abs=1e-10)
    assert separability(100 * x + 7, 3 * labels) == pytest.approx(reference.separability(x, labels), abs=1e-10)


def test_accuracies(space):
    x, labels = space
    parts = (x[:60], labels[:60], x[60:], labels[60:])
    assert centroid_accuracy(*parts) == reference.centroid_accuracy(*parts)
    assert knn_accuracy(*parts, k=1) == reference.nearest_accuracy(
        x[:60], labels[:60].tolist(), x[60:], labels[60:].tolist()
    )
    assert 0.25 < centroid_accuracy(*parts) < 1 and knn_accuracy(*parts, k=500) == pytest.approx(0.25)


@pytest.mark.parametrize("head", ["logistic", "mlp"])
def test_probes_learn_what_can_be_learnt(head):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    x = 3 * torch.eye(8)[labels] + 0.3 * torch.randn(600, 8, generator=generator)
    parts = (x[:500], labels[:500], x[500:], labels[500:])
    assert linear_probe(*parts, head=head) > 0.97
    assert linear_probe(*parts, head=head) == linear_probe(*parts, head=head)
    shuffled = labels[torch.randperm(600, generator=generator)]
    assert linear_probe(x[:500], shuffled[:500], x[500:], shuffled[500:], head=head) < 0.6


def test_splits_are_by_id():
    fit, score = split_ids(["b", "a", "c", "a", "d", "b"], 0.25)
    assert sorted(fit + score) == ["a", "b", "c", "d"] and len(score) == 1
    assert split_ids(["d", "c", "b", "a"], 0.25) == (fit, score)
    assert len({tuple(split_ids(range(50), 0.1, seed)[1]) for seed in range(4)}) == 4
    for ids, size in (([1], 0.5), ([1, 2], 0), ([1, 2], 1)):
        with pytest.raises(ValueError, match="leaves nothing on one side"):
            split_ids(ids, size)


def test_spaces_are_compared_row_by_row_on_shared_samples(space):
    x, labels = space
    a = EmbeddingSet("a", range(80), x, labels)
    order = torch.randperm(80)
    y = x @ torch.randn(6, 4, dtype=torch.float64)
    b = LatentSpace(
        np.append(order[:70].numpy(), 200),
        torch.cat([y[order[:70]], torch.ones(1, 4)]),
        None,
        torch.ones(71, 1, dtype=torch.bool),
        ["b"],
        [0, 1, 2, 3],
    )
    rows = order[:70].sort().values
    found = compare_spaces(a, b)
    assert found["rows"] == 70
    assert found["cka"] == pytest.approx(reference.gram_cka(x[rows], y[rows]), abs=1e-6)
    assert found["separability_b"] == pytest.approx(reference.separability(y[rows], labels[rows]), rel=1e-5)
    fit, score = (torch.tensor(part) for part in split_ids(rows.tolist()))
    assert found["centroid_accuracy_a"] == reference.centroid_accuracy(x[fit], labels[fit], x[score], labels[score])
    assert {"knn_accuracy_a", "linear_probe_a", "knn_accuracy_b", "linear_probe_b"} <= set(found)
    other = compare_spaces(a, b, labels={sample: sample % 2 for sample in range(80)})
    assert other["separability_a"] == pytest.approx(reference.separability(x[rows], rows % 2), rel=1e-5)
    bare = EmbeddingSet("a", range(80), x)
    assert compare_spaces(bare, b).keys() == {"rows", "cka"}


def test_bad_input_is_one_sentence(space):
    x, labels = space
    with pytest.raises(ValueError, match="CKA compares two spaces of the same samples"):
        linear_cka(x, x[:3])
    with pytest.raises(ValueError, match="rows are all equal"):
        linear_cka(x, torch.ones(80, 2))
    with pytest.raises(ValueError, match="Separability needs at least two classes"):
        separability(x, labels * 0)
    with pytest.raises(ValueError, match=r"The classes \[0, 1\] have no spread"):
        separability(torch.eye(2), torch.arange(2))
    with pytest.raises(ValueError, match="All 80 rows to fit on are of one class"):
        centroid_accuracy(x, labels * 0, x, labels)
    with pytest.raises(ValueError, match="the rows to score include some without a class"):
        knn_accuracy(x, labels, x, labels - 1)
    with pytest.raises(ValueError, match="give one label per row"):
        linear_probe(x, labels[:5], x, labels)
    with pytest.raises(ValueError, match="are 6 wide and those to score 5"):
        linear_probe(x, labels, x[:, :5], labels)
    with pytest.raises(KeyError, match="Unknown head 'svm'; known ones are logistic, mlp"):
        linear_probe(x, labels, x, labels, head="svm")
    with pytest.raises(ValueError, match="k is 0"):
        knn_accuracy(x, labels, x, labels, k=0)
    a = EmbeddingSet("a", range(80), x, labels)
    with pytest.raises(ValueError, match="share 0 samples; a comparison needs at least two"):
        compare_spaces(a, EmbeddingSet("b", ["x", "y"], x[:2]))
    with pytest.raises(ValueError, match="give the sample 0 different labels"):
        compare_spaces(a, EmbeddingSet("b", range(80), x, 3 - labels))
    with pytest.raises(KeyError, match="labels lacks the samples 5; give"):
        compare_spaces(a, a, labels={sample: 0 for sample in range(80) if sample != 5})
