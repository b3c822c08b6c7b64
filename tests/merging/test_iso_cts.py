from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import merge_task_vectors

from . import reference_spectral as reference
from .testing_utils import as_numpy, random_vectors


def merge(vectors, **kwargs):
    return merge_task_vectors(vectors, "iso_cts", **kwargs)["w"]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(24, 18), (18, 24), (21, 21)])
def test_iso_cts_matches_the_reference(shape, fraction):
    vectors, weights = random_vectors(3, {"w": shape}, dtype=torch.float64), [1.0, -0.5, 2.0]
    merged = merge(vectors, weights=weights, common_space_fraction=fraction)
    expected = reference.iso_cts([v["w"] for v in as_numpy(vectors)], weights, fraction)
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-9)


def test_float32_agrees_with_the_float64_reference_to_1e5():
    vectors = random_vectors(3, {"w": (120, 120)})
    expected = reference.iso_cts([v["w"] for v in as_numpy(vectors)], [1] * 3, 0.8)
    merged = merge(vectors)
    assert merged.dtype == torch.float32
    assert np.linalg.norm(merged.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_one_task_gives_iso_c():
    vectors = random_vectors(1, {"w": (9, 7)}, dtype=torch.float64)
    torch.testing.assert_close(merge(vectors), merge_task_vectors(vectors, "iso_c")["w"], atol=1e-10, rtol=0)


def test_the_whole_fraction_gives_iso_c():
    vectors = random_vectors(3, {"w": (9, 7)}, dtype=torch.float64)
    expected = merge_task_vectors(vectors, "iso_c")["w"]
    torch.testing.assert_close(merge(vectors, common_space_fraction=1.0), expected, atol=1e-10, rtol=0)


def test_homogeneous():
    vectors = random_vectors(3, {"w": (8, 5)}, dtype=torch.float64)
    scaled = [{"w": 0.37 * v["w"]} for v in vectors]
    torch.testing.assert_close(merge(scaled, names="abc"), 0.37 * merge(vectors, names="abc"), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(3, 2), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("fraction", [0.0, 0.8])
def test_more_tasks_than_rank(shape, fraction):
    merged = merge(random_vectors(7, {"w": shape}), common_space_fraction=fraction)
    assert torch.isfinite(merged).all() and float(merged.abs().max()) > 0


def test_low_rank_tasks_add_no_rounding():
    # Every task lies in the common space: what the projection leaves of it must not count as directions of its own.
    left, right = random_vectors(1, {"l": (12, 2), "r": (2, 10)})[0].values()
    cores = random_vectors(3, {"w": (2, 2)}, seed=1)
    vectors = [{"w": (left.double() @ core["w"].double() @ right.double()).float()} for core in cores]
    expected = merge_task_vectors(vectors, "iso_c")["w"]
    torch.testing.assert_close(merge(vectors), expected, atol=1e-5, rtol=0)


def test_opposed_tasks_still_add_their_own_directions():
    vector = random_vectors(1, {"w": (20, 20)})[0]["w"]
    merged = merge([{"w": vector}, {"w": -vector}])
    assert torch.isfinite(merged).all() and float(merged.abs().max()) > 0


def test_zero_matrices():
    zero, full = {"w": torch.zeros(5, 4)}, {"w": torch.diag(torch.ones(5))[:, :4] * 2}
    assert torch.equal(merge([zero, zero]), torch.zeros(5, 4))
    assert torch.isfinite(merge([zero, full])).all()


def test_projection_acts_on_outputs_in_both_layouts():
    shapes = {"h.weight": (20, 30), "h.bias": (20,)}
    vectors = random_vectors(3, shapes, dtype=torch.float64)
    flipped = [{"h.weight": v["h.weight"].T.contiguous(), "h.bias": v["h.bias"]} for v in vectors]
    plain = merge_task_vectors(vectors, "iso_cts", names="abc")["h.weight"]
    found = merge_task_vectors(flipped, "iso_cts", names="abc")["h.weight"]
    torch.testing.assert_close(found.T, plain, atol=1e-10, rtol=0)
    told = merge_task_vectors(flipped, "iso_cts", names="abc", transposed=["h.*"])["h.weight"]
    assert torch.equal(told, found)
    wrong = merge_task_vectors(flipped, "iso_cts", names="abc", transposed=[])["h.weight"]
    assert not torch.allclose(wrong.T, plain, atol=1e-3)
