"""Surgery on inner products against surgery on the vectors themselves."""

from __future__ import annotations

import pytest
import torch

from hf_atm.seeding import derive_seed
from hf_atm.surgery import SURGERIES, MixedTaskVector, gram_schmidt, pcgrad


NAMES = ["a", "b", "c", "d"]


def conflicting(seed=0, size=30):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(4, size, dtype=torch.float64, generator=generator)
    vectors[1] -= 1.5 * vectors[0]
    vectors[3] -= 0.5 * vectors[2]
    return vectors


def test_pcgrad_equals_projection_of_the_vectors_one_after_the_other():
    vectors = conflicting()
    expected = []
    for t, name in enumerate(NAMES):
        vector = vectors[t].clone()
        others = [s for s in range(4) if s != t]
        generator = torch.Generator().manual_seed(derive_seed(5, "pcgrad", name))
        for index in torch.randperm(3, generator=generator).tolist():
            other = vectors[others[index]]
            if vector @ other < 0:
                vector = vector - (vector @ other) / (other @ other) * other
        expected.append(vector)
    result = pcgrad(vectors @ vectors.T, NAMES, 5) @ vectors
    assert torch.allclose(result, torch.stack(expected), atol=1e-12)
    assert not torch.allclose(result, vectors)


def test_gram_schmidt_leaves_orthogonal_vectors_and_the_first_one_unchanged():
    vectors = conflicting()
    result = gram_schmidt(vectors @ vectors.T, NAMES, 3) @ vectors
    products = result @ result.T
    assert float((products - products.diag().diag()).abs().max()) < 1e-10
    unchanged = [bool(torch.equal(new, old)) for new, old in zip(result, vectors, strict=True)]
    assert sum(unchanged) == 1
    assert torch.linalg.matrix_rank(torch.cat([result, vectors])) == 4


def test_a_dependent_vector_becomes_zero_and_disturbs_no_other():
    vectors = conflicting()
    vectors[2] = vectors[0] + vectors[1]
    result = gram_schmidt(vectors @ vectors.T, NAMES, 1) @ vectors
    lengths = result.norm(dim=1)
    assert int((lengths < 1e-6).sum()) == 1
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", sorted(SURGERIES))
def test_vectors_that_do_not_meet_stay_as_they_are(name):
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64))
    assert torch.equal(SURGERIES[name](gram, NAMES, 0), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(SURGERIES))
def test_the_order_of_tasks_changes_nothing(name):
    vectors = conflicting(seed=2)
    first = SURGERIES[name](vectors @ vectors.T, NAMES, 9) @ vectors
    order = [2, 0, 3, 1]
    shuffled = vectors[order]
    second = SURGERIES[name](shuffled @ shuffled.T, [NAMES[i] for i in order], 9) @ shuffled
    assert torch.allclose(second, first[order], atol=1e-12)


def test_a_mixed_vector_is_multiplied_out_on_reading():
    vectors = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([10.0, 20.0])}, {"x": torch.tensor([5.0, 5.0])}]
    mixed = MixedTaskVector(vectors, [2.0, -0.5, 0.0])
    assert mixed["x"].tolist() == [-3.0, -6.0]
    assert list(mixed) == ["x"] and len(mixed) == 1
    assert vectors[0]["x"].tolist() == [1.0, 2.0]
