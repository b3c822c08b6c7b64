from __future__ import annotations

import pytest
import torch

from hf_atm.merging import linear_coefficients, merge_task_vectors

from . import reference
from .testing_utils import as_numpy, assert_near, random_vectors


A = {"w": torch.tensor([1.0, 2.0, -4.0])}
B = {"w": torch.tensor([3.0, -2.0, 0.0])}


def test_golden_mean_and_sum():
    assert merge_task_vectors([A, B])["w"].tolist() == [2.0, 0.0, -2.0]
    assert merge_task_vectors([A, B], weights=[3, 1])["w"].tolist() == [1.5, 1.0, -3.0]
    assert merge_task_vectors([A, B], "task_arithmetic")["w"].tolist() == [4.0, 0.0, -4.0]
    assert merge_task_vectors([A, B], "task_arithmetic", weights=[1, -1])["w"].tolist() == [-2.0, 4.0, -4.0]
    assert merge_task_vectors([A, B], "task_arithmetic", scaling_coefficient=0.5)["w"].tolist() == [2.0, 0.0, -2.0]
    assert merge_task_vectors([A, B], "task_arithmetic", scaling_factor=0.5)["w"].tolist() == [2.0, 0.0, -2.0]
    assert merge_task_vectors([A, B], "mean", normalize=False)["w"].tolist() == [4.0, 0.0, -4.0]


def test_mean_matches_the_reference():
    vectors = random_vectors(3)
    merged = merge_task_vectors(vectors, "linear", weights=[0.2, 0.5, -0.1])
    # Only the final rounding to float32 separates the two.
    assert_near(merged, reference.mean(as_numpy(vectors), [0.2, 0.5, -0.1]), 1e-7)


@pytest.mark.parametrize("method", ["mean", "task_arithmetic"])
def test_coefficients_rebuild_the_merge(method):
    vectors, weights = random_vectors(3), [2.0, 0.0, -0.5]
    merged = merge_task_vectors(vectors, method, weights=weights, scaling_coefficient=0.7)
    coefficients = linear_coefficients(method, weights, scaling_coefficient=0.7)
    streamed = {key: sum(c * v[key].double() for c, v in zip(coefficients, vectors, strict=True)) for key in merged}
    assert_near(merged, streamed, 2e-7)


def test_coefficient_values_and_errors():
    assert linear_coefficients("mean", [1, 1, 2]) == [0.25, 0.25, 0.5]
    assert linear_coefficients("mean", [1, 1], normalize=False) == [1.0, 1.0]
    assert linear_coefficients("task_arithmetic", [1, 3]) == [1.0, 3.0]
    assert linear_coefficients("task_arithmetic", [1, 3], normalize=True) == [0.25, 0.75]
    with pytest.raises(ValueError, match="sum to zero"):
        linear_coefficients("mean", [0.1, 0.2, -0.3])
    with pytest.raises(ValueError, match="not a linear"):
        linear_coefficients("ties", [1.0])
    with pytest.raises(ValueError, match="norm"):
        linear_coefficients("mean", [1.0], scaling_coefficient="norm")


def test_accumulation_is_one_precision_up():
    # In float32 the small entries vanish beside 1e8 before it cancels.
    parts = [{"w": torch.tensor([value])} for value in (1e8, 1.0, 1.0, -1e8)]
    assert merge_task_vectors(parts, "task_arithmetic", names=["a", "b", "c", "d"])["w"].item() == 2.0
