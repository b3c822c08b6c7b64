from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_atm.merging import get_merge_method, merge_state_dicts, merge_task_vectors
from hf_atm.merging.interpolation import inner_products
from hf_atm.merging.tensors import canonical_tasks

from . import reference_geometric as reference
from .testing_utils import assert_same, random_vectors


FIRST, SECOND = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
THREE = ["a", "b", "c"]


def merge(method, arrays, weights=None, **kwargs):
    vectors = [{"w": torch.as_tensor(array)} for array in arrays]
    return merge_task_vectors(vectors, method, weights, **kwargs)["w"].numpy()


def arrays(count, size=20, seed=0):
    # Not centred, so that the vectors lie in one half of the sphere.
    return list(np.random.default_rng(seed).normal(0.5, 1, size=(count, size)))


def test_slerp_golden():
    half = 0.5**0.5
    torch.testing.assert_close(merge_task_vectors([FIRST, SECOND], "slerp")["w"], torch.tensor([half, half]))
    merged = merge_task_vectors([FIRST, SECOND], "slerp", t=1 / 3)["w"]
    torch.testing.assert_close(merged, torch.tensor([0.75**0.5, 0.5]))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_slerp_matches_the_reference(t):
    a, b = arrays(2)
    np.testing.assert_allclose(merge("slerp", [a, 3 * b], t=t), reference.slerp(a, 3 * b, t), atol=1e-12)


def test_slerp_ends_are_the_models_in_the_order_given():
    a, b = random_vectors(2)
    assert_same(merge_task_vectors([a, b], "slerp", t=0), a)
    assert_same(merge_task_vectors([a, b], "slerp", t=1), b)
    assert_same(merge_task_vectors([a, b], "slerp", names=["z", "a"], t=0.0), a)
    assert_same(merge_task_vectors([a, b], "slerp", [1, 0]), a)
    assert_same(merge_task_vectors([a, b], "slerp", [0, 2]), b)


def test_slerp_of_exchanged_models():
    a, b = random_vectors(2)
    for named in ({}, {"names": ["x", "y"]}):
        swapped = {key: value[::-1] for key, value in named.items()}
        assert_same(
            merge_task_vectors([a, b], "slerp", t=0.3, **named), merge_task_vectors([b, a], "slerp", t=0.7, **swapped)
        )
        assert_same(
            merge_task_vectors([a, b], "slerp", [3, 1], **named),
            merge_task_vectors([b, a], "slerp", [1, 3], **swapped),
        )


def test_slerp_weights_place_the_result():
    a, b = random_vectors(2)
    assert_same(merge_task_vectors([a, b], "slerp", [3, 1]), merge_task_vectors([a, b], "slerp", t=0.25))


def test_nearly_parallel_tensors_take_the_straight_line():
    a = arrays(1)[0]
    for b in (a * 2, -a, a + 1e-3):
        np.testing.assert_allclose(merge("slerp", [a, b], t=0.25), 0.75 * a + 0.25 * b, atol=1e-12)


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_opposite_zero_single_and_empty_tensors(method):
    a = arrays(1)[0]
    np.testing.assert_allclose(merge(method, [a, -a], [3, 1]), a / 2, atol=1e-12)
    np.testing.assert_array_equal(merge(method, [a * 0, a * 0]), a * 0)
    np.testing.assert_allclose(merge(method, [a * 0, a]), a / 2, atol=1e-12)
    np.testing.assert_allclose(merge(method, [np.array([2.0]), np.array([4.0])], [1, 3]), [3.5])
    np.testing.assert_allclose(merge(method, [np.array(-2.0), np.array(4.0)], [1, 3]), 2.5)
    assert merge(method, [np.zeros((0, 3)), np.zeros((0, 3))]).shape == (0, 3)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 3.0, 1.0]])
def test_karcher_matches_the_reference(weights):
    vectors = [scale * v for scale, v in zip((1, 5, 0.1), arrays(3), strict=True)]
    merged = merge("karcher", vectors, weights, tol=1e-14, max_iter=50)
    np.testing.assert_allclose(merged, reference.karcher(vectors, weights, 50), atol=1e-10)
    for count in (1, 2):
        merged = merge("karcher", vectors, weights, tol=1e-14, max_iter=count)
        np.testing.assert_allclose(merged, reference.karcher(vectors, weights, count), atol=1e-12)
    default = merge("karcher", vectors, weights)
    np.testing.assert_allclose(default, reference.karcher(vectors, weights, 50), atol=1e-4)


def test_karcher_of_two_is_slerp_up_to_length():
    a, b = arrays(2)
    for share in (0.5, 0.2):
        merged = merge("karcher", [a, 3 * b], [1 - share, share], tol=1e-12)
        unit_a, unit_b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        direction = reference.slerp(unit_a, unit_b, share)
        length = (1 - share) * np.linalg.norm(a) + share * np.linalg.norm(3 * b)
        np.testing.assert_allclose(merged, length * direction, atol=1e-9)


def test_karcher_turns_with_its_inputs():
    vectors = arrays(3)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0]
    np.testing.assert_allclose(
        merge("karcher", [turn @ v for v in vectors]), turn @ merge("karcher", vectors), atol=1e-10
    )


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, -0.25, 2.0]])
def test_model_stock_matches_the_reference(weights):
    vectors = arrays(3)
    expected = reference.model_stock(vectors, weights)
    np.testing.assert_allclose(merge("model_stock", vectors, weights), expected, atol=1e-12)
    assert np.linalg.norm(expected) > 0.1


@pytest.mark.parametrize("count", [1, 2, 7])
def test_copies_come_back(count):
    vector = random_vectors(1)[0]
    for method in ("karcher", "model_stock", "slerp"):
        if method != "slerp" or count == 2:
            assert_same(merge_task_vectors([vector] * count, method), vector)


def test_model_stock_is_the_base_where_tasks_disagree():
    merged = merge_task_vectors([FIRST, SECOND], "model_stock")
    assert merged["w"].tolist() == [0.0, 0.0]
    assert merge("model_stock", [np.ones(4), -np.ones(4)], [3, 1]).tolist() == [0.0] * 4


def test_model_stock_has_no_absolute_floor():
    vectors = arrays(3)
    tiny = merge("model_stock", [v * 1e-30 for v in vectors])
    np.testing.assert_allclose(tiny, 1e-30 * merge("model_stock", vectors), rtol=1e-10)
    noise = [vectors[0], vectors[0], vectors[0] * 1e-12]
    # Of three pairs only one agrees: c = 1/3, t = 0.6.
    np.testing.assert_allclose(merge("model_stock", noise), 0.6 * sum(noise) / 3, rtol=1e-9)


@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_zero_tasks_do_not_disturb(method):
    zero = {key: torch.zeros_like(tensor) for key, tensor in random_vectors(1)[0].items()}
    assert_same(merge_task_vectors([zero, zero], method), zero)
    merged = merge_task_vectors([zero, random_vectors(1)[0]], method)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())


def test_permuted_inputs_are_bit_equal():
    vectors, weights = random_vectors(3), [0.3, 0.1, 0.7]
    results = [
        merge_task_vectors(
            [vectors[i] for i in order], "karcher", [weights[i] for i in order], [THREE[i] for i in order]
        )
        for order in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        assert_same(result, results[0])


def test_parameters_are_merged_whether_or_not_there_is_a_base():
    experts, base = random_vectors(2, seed=1), random_vectors(1, seed=2)[0]
    for method in ("slerp", "karcher"):
        merged = merge_state_dicts(experts, method=method)
        assert_same(merged, merge_task_vectors(experts, method))
        assert_same(merged, merge_state_dicts(experts, base, method))


@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_one_tensor_at_a_time_gives_the_same(method):
    vectors, names = random_vectors(2), ["x", "y"]
    function = get_merge_method(method).function
    whole = function(vectors, [1.0, 1.0], names)
    for key in whole:
        alone = function([{key: vector[key]} for vector in vectors], [1.0, 1.0], names)
        assert torch.equal(alone[key], whole[key])


def test_inner_products_of_several_chunks(monkeypatch):
    monkeypatch.setattr("hf_atm.merging.interpolation.CHUNK", 7)
    vectors = arrays(3)
    gram = inner_products(canonical_tasks([{"w": torch.tensor(v)} for v in vectors], [1, 1, 1], THREE), "w")
    np.testing.assert_allclose(gram.numpy(), np.array(vectors) @ np.array(vectors).T, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "count", "arguments", "words"),
    [
        ("slerp", 3, {}, ["3", "'karcher'"]),
        ("slerp", 1, {}, ["got 1"]),
        ("slerp", 2, {"t": 1.5}, ["t=1.5", "[0, 1]"]),
        ("slerp", 2, {"t": float("nan")}, ["t=nan"]),
        ("slerp", 2, {"t": 0.5, "weights": [1, 2]}, ["t=0.5", "[1.0, 2.0]"]),
        ("slerp", 2, {"weights": [1, -1]}, ["'slerp'", "negative"]),
        ("slerp", 2, {"weights": [0, 0]}, ["sum to zero"]),
        ("karcher", 2, {"weights": [1, -0.5]}, ["'karcher'", "-0.5"]),
        ("karcher", 2, {"weights": [0, 0]}, ["sum to zero"]),
        ("karcher", 2, {"max_iter": 0}, ["max_iter=0"]),
        ("karcher", 2, {"tol": 0.0}, ["tol=0.0"]),
        ("model_stock", 2, {"weights": [1, -1]}, ["sum to zero"]),
    ],
)
def test_bad_input_is_refused_in_one_sentence(method, count, arguments, words):
    with pytest.raises(ValueError) as error:
        merge_task_vectors(random_vectors(count), method, **arguments)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message
