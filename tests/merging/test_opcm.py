from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import check_merge_kwargs, get_merge_method, merge_state_dicts, merge_task_vectors

from . import reference_spectral as reference
from .testing_utils import as_numpy, assert_near, random_vectors


SHAPES = {"a.weight": (9, 7), "a.bias": (9,), "b.weight": (6, 10)}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 4])
def test_one_factor_at_the_end_equals_the_recurrence(alpha, count):
    vectors = random_vectors(count, SHAPES, dtype=torch.float64)
    merged = merge_task_vectors(vectors, "opcm", alpha=alpha)
    assert_near(merged, reference.opcm(as_numpy(vectors), alpha), 1e-9)


def test_float32_agrees_with_the_float64_reference_to_1e5():
    vectors = random_vectors(3, {"w": (80, 80)})
    merged, expected = merge_task_vectors(vectors, "opcm")["w"], reference.opcm(as_numpy(vectors), 0.5)["w"]
    assert merged.dtype == torch.float32
    assert np.linalg.norm(merged.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_merged_model_has_the_mean_norm_of_the_tasks():
    vectors = random_vectors(3, SHAPES)
    merged = merge_task_vectors(vectors, "opcm")
    norms = [np.sqrt(sum((t**2).sum() for t in v.values())) for v in as_numpy([*vectors, merged])]
    np.testing.assert_allclose(norms[3], np.mean(norms[:3]), rtol=1e-6)


def test_the_sequence_counts_and_names_do_not():
    vectors = random_vectors(3, {"w": (8, 8)})
    merged = merge_task_vectors(vectors, "opcm", names="abc")["w"]
    assert torch.equal(merged, merge_task_vectors(vectors, "opcm", names="cab")["w"])
    assert not torch.allclose(merged, merge_task_vectors(vectors[::-1], "opcm")["w"], atol=1e-3)


def test_one_task_is_returned():
    vector = random_vectors(1, SHAPES)[0]
    merged = merge_task_vectors([vector], "opcm")
    assert all(torch.equal(merged[key], vector[key]) for key in SHAPES)
    base = random_vectors(1, SHAPES, seed=1)[0]
    model = {key: base[key] + vector[key] for key in SHAPES}
    restored = merge_state_dicts([model], base, "opcm")
    assert all(torch.allclose(restored[key], model[key], atol=1e-6) for key in SHAPES)


def test_a_second_task_in_the_space_of_the_first_adds_nothing():
    vector = random_vectors(1, {"w": (8, 8)}, dtype=torch.float64)[0]["w"]
    merged = get_merge_method("opcm").function([{"w": vector}, {"w": 3 * vector}], [1, 1], ["a", "b"], alpha=1.0)["w"]
    torch.testing.assert_close(merged, vector, atol=1e-12, rtol=0)


def test_orthogonal_tasks_are_summed():
    first, second = torch.zeros(6, 6), torch.zeros(6, 6)
    first[0, 0], first[1, 1], second[2, 3], second[4, 2] = 2.0, 1.0, 3.0, 1.0
    merged = get_merge_method("opcm").function([{"w": first}, {"w": second}], [1, 1], ["a", "b"])["w"]
    torch.testing.assert_close(merged, first + second)


def test_other_tensors_are_summed_and_weights_count():
    vectors = random_vectors(3, {"embed.weight": (5, 4), "bias": (5,)}, dtype=torch.float64)
    merged = get_merge_method("opcm").function(vectors, [1.0, 2.0, 0.0], ["a", "b", "c"])
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, vectors[0][key] + 2 * vectors[1][key])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (3, 2)])
def test_more_tasks_than_rank_and_zero_tasks(shape):
    vectors = [*random_vectors(4, {"w": shape}), {"w": torch.zeros(shape)}]
    for order in (vectors, vectors[::-1]):
        assert torch.isfinite(merge_task_vectors(order, "opcm")["w"]).all()
    zeros = [{"w": torch.zeros(shape)}] * 2
    assert torch.equal(merge_task_vectors(zeros, "opcm")["w"], torch.zeros(shape))


def test_alpha_is_a_share():
    for alpha in (-0.1, 1.1, "0.5"):
        with pytest.raises(ValueError, match=r"alpha.*\[0, 1\]"):
            check_merge_kwargs("opcm", {"alpha": alpha})
