from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import get_merge_method, merge_task_vectors, tall_masks
from hf_atm.merging.elementwise import chunks

from . import reference, reference_elementwise
from .testing_utils import METHODS, as_numpy, assert_near, assert_same, random_vectors


ALL = {"min_sparse_numel": 0}
ELEMENTWISE = [name for name in METHODS if get_merge_method(name).family == "elementwise"]
MASKED = [name for name in ELEMENTWISE if "min_sparse_numel" in get_merge_method(name).parameters]


def tensors(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def test_breadcrumbs_golden_and_reference():
    row = [[10.0, 1.0, -9.0, 2.0, -3.0, 4.0, 5.0, -6.0, 7.0, 8.0]]
    # Drop the top 2 (10, -9), keep the next 3 (8, 7, -6).
    merged = merge_task_vectors(tensors(*row), "breadcrumbs", density=0.3, gamma=0.2, **ALL)
    assert merged["w"].tolist() == [0, 0, 0, 0, 0, 0, 0, -6.0, 7.0, 8.0]
    vectors = random_vectors(3)
    merged = merge_task_vectors(vectors, "breadcrumbs", [1, 2, 1], density=0.4, gamma=0.1, **ALL)
    assert_near(merged, reference.breadcrumbs(as_numpy(vectors), [1, 2, 1], 0.4, 0.1), 1e-6)
    total = merge_task_vectors(vectors, "breadcrumbs", [1, 2, 1], density=0.4, gamma=0.1, normalize=False, **ALL)
    torch.testing.assert_close(total["layer.weight"], 4 * merged["layer.weight"])


def test_breadcrumbs_with_equal_magnitudes_keeps_the_right_number():
    merged = merge_task_vectors([{"w": torch.ones(10)}], "breadcrumbs", density=0.3, gamma=0.2, **ALL)
    assert merged["w"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


def test_breadcrumbs_ties_elects_among_the_crumbs():
    vectors, weights = random_vectors(3, dtype=torch.bfloat16), [1.0, 2.0, 1.0]
    merged = merge_task_vectors(vectors, "breadcrumbs_ties", weights, list("abc"), density=0.4, gamma=0.1, **ALL)
    crumbs = [reference.breadcrumbs([vector], [1.0], 0.4, 0.1) for vector in as_numpy(vectors)]
    assert_near(merged, reference.ties(crumbs, weights, 1.0, "tensor"), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("threshold", [0.4, [0.2, 0.6, 1.5]])
def test_consensus_matches_the_reference(k, threshold):
    vectors, weights = random_vectors(3), [1.0, 0.5, 2.0]
    merged = merge_task_vectors(vectors, "consensus", weights, list("abc"), mask_threshold=threshold, k=k)
    each = threshold if isinstance(threshold, list) else [threshold] * 3
    assert_near(merged, reference_elementwise.consensus(as_numpy(vectors), weights, each, min(k, 3)), 1e-6)


def test_consensus_golden_by_hand():
    # Sums 4, 3, -1, 0. At 0.5, 1 of (3, 1) is below half of 3, so the first is selfish; 2 and 1 need each other's;
    # in -2 and 1 the second is exactly half, which is not more; opposites always need their entry.
    rows = tensors([3.0, 2.0, -2.0, 1.0], [1.0, 1.0, 1.0, -1.0])
    merged = merge_task_vectors(rows, "consensus", names=["a", "b"], mask_threshold=0.5)
    assert merged["w"].tolist() == [0.0, 0.0, 0.0, 0.0]
    merged = merge_task_vectors(rows, "consensus", names=["a", "b"], mask_threshold=0.3)
    assert merged["w"].tolist() == [4.0, 3.0, -1.0, 0.0]
    merged = merge_task_vectors(rows, "consensus", names=["a", "b"], mask_threshold=0.5, k=1)
    assert merged["w"].tolist() == [4.0, 3.0, -1.0, 0.0]


def test_thresholds_stay_with_their_tasks_when_these_are_permuted():
    vectors, thresholds, names = random_vectors(3), [0.2, 0.9, 2.0], ["c", "a", "b"]
    merged = merge_task_vectors(vectors, "consensus", names=names, mask_threshold=thresholds)
    swapped = merge_task_vectors(vectors[::-1], "consensus", names=names[::-1], mask_threshold=thresholds[::-1])
    assert_same(merged, swapped)
    assert_same(
        merge_task_vectors(vectors, "consensus", [1, 0, 1], names, mask_threshold=thresholds),
        merge_task_vectors(vectors[::2], "consensus", [1, 1], names[::2], mask_threshold=thresholds[::2]),
    )


def test_thresholds_are_counted():
    with pytest.raises(ValueError, match="Got 2 values of mask_threshold for 3 tasks"):
        merge_task_vectors(random_vectors(3), "consensus", mask_threshold=[0.1, 0.2])


def test_tall_masks_rebuild_each_task(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)
    vectors, names, weights = random_vectors(3), ["c", "a", "b"], [1.0, 0.5, 2.0]
    packed = tall_masks(vectors, names, weights, mask_threshold=[0.3, 0.5, 0.8])
    for index, name in enumerate(names):
        expected = reference_elementwise.tall(as_numpy(vectors), weights, [0.3, 0.5, 0.8], index)
        assert_near(packed.task_vector(name), expected, 1e-6)
    bits = sum(mask.numel() for mask in packed.masks["a"].values())
    assert bits <= sum(tensor.numel() for tensor in vectors[0].values()) / 8 + len(vectors[0])


def test_tall_masks_of_tasks_that_do_not_meet_are_lossless():
    vectors = tensors([1.0, 0.0, 0.0, 2.0], [0.0, -3.0, 0.0, 0.0])
    packed = tall_masks(vectors, ["a", "b"])
    for name, vector in zip("ab", vectors, strict=True):
        assert torch.equal(packed.task_vector(name)["w"], vector["w"])
    with pytest.raises(KeyError, match="'c'; the tasks are a, b"):
        packed.task_vector("c")
    with pytest.raises(ValueError, match="mask_threshold=-1"):
        tall_masks(vectors, ["a", "b"], mask_threshold=-1)
    with pytest.raises(ValueError, match="same shapes"):
        tall_masks([*vectors, {"w": torch.ones(3)}], ["a", "b", "c"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magmax_matches_the_reference(dtype):
    vectors, weights = random_vectors(3, dtype=dtype), [1.0, -0.5, 2.0]
    merged = merge_task_vectors(vectors, "magmax", weights, list("abc"))
    assert_near(merged, reference_elementwise.magmax(as_numpy(vectors), weights), 1e-6)


def test_magmax_gives_equal_magnitudes_to_the_last_name():
    rows = tensors([2.0, -1.0], [-2.0, 1.0])
    assert merge_task_vectors(rows, "magmax", names=["a", "b"])["w"].tolist() == [-2.0, 1.0]
    assert merge_task_vectors(rows, "magmax", names=["b", "a"])["w"].tolist() == [2.0, -1.0]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("tails", [0.0, 1e-4, 0.1])
def test_pcb_matches_the_reference(count, density, tails, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 32)
    vectors, weights = random_vectors(count), [1.0, 0.5, 2.0, 1.0, 1.0][:count]
    merged = merge_task_vectors(vectors, "pcb", weights, list("abcde")[:count], density=density, clip_tails=tails)
    assert_near(merged, reference_elementwise.pcb(as_numpy(vectors), weights, density, tails), 1e-6)


def test_pcb_golden_by_hand():
    # nu is 0, 1/2, 1, so that scores are tanh(1), exp(1/4), exp(1); the second largest is the quantile, with 0 itself.
    merged = merge_task_vectors(tensors([1.0, 5.0, -9.0]), "pcb", density=0.6, clip_tails=0.0)
    assert merged["w"].tolist() == [0.0, 0.0, -9.0]
    merged = merge_task_vectors(tensors([1.0, 5.0, -9.0]), "pcb", density=1.0, clip_tails=0.0)
    assert merged["w"].tolist() == [0.0, 5.0, -9.0]
    both = merge_task_vectors(tensors([1.0, 5.0, -9.0], [1.0, 5.0, 9.0]), "pcb", density=0.6, clip_tails=0.0)
    # The third entries cancel: tanh(0) = 0 takes the largest entry out of the competition.
    assert both["w"][2].item() == 0.0 and both["w"][1].item() == 5.0


def test_pcb_survives_ranges_that_are_points():
    assert merge_task_vectors(tensors([2.0]), "pcb")["w"].tolist() == [2.0]
    assert merge_task_vectors(tensors([2.0, 2.0], [0.0, 0.0]), "pcb")["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("method", [*ELEMENTWISE, "tsv_m"])
def test_weight_zero_means_absent(method):
    vectors, kwargs = random_vectors(3), METHODS[method]
    with_zero = merge_task_vectors(vectors, method, [1, 1, 0], ["a", "b", "c"], **kwargs)
    assert_same(with_zero, merge_task_vectors(vectors[:2], method, [1, 1], ["a", "b"], **kwargs))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_at_least_one_entry_survives(method):
    for scope in ({"trim_scope": "tensor"}, {"trim_scope": "model"}) if method == "ties" else ({"gamma": 0.0},):
        vectors = [{"a": torch.tensor([2.0, -3.0, 1.0]), "b": torch.tensor([1.0])}]
        merged = merge_task_vectors(vectors, method, density=0.01, **scope, **ALL)
        assert merged["a"].tolist() == [0.0, -3.0, 0.0]
    for gamma in (0.9, 1 - 1e-14):
        one = merge_task_vectors([{"a": torch.tensor([2.0])}], "breadcrumbs", density=1e-14, gamma=gamma, **ALL)
        assert one["a"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("method", "kwargs", "words"),
    [
        ("consensus", {"mask_threshold": -0.1}, ["mask_threshold=-0.1", "at least 0"]),
        ("consensus", {"mask_threshold": [0.2, "a"]}, ["mask_threshold=[0.2, 'a']", "one per task"]),
        ("consensus", {"mask_threshold": []}, ["mask_threshold=[]"]),
        ("consensus", {"k": 0}, ["k=0", "at least 1"]),
        ("consensus", {"k": 1.5}, ["k=1.5", "integer"]),
        ("pcb", {"clip_tails": 0.5}, ["clip_tails=0.5", "[0, 0.5)"]),
        ("pcb", {"density": 0.0}, ["density=0.0"]),
        ("della", {"density": 0.5, "epsilon": -0.1}, ["epsilon=-0.1"]),
        ("della", {}, ["needs", "density"]),
        ("della_linear", {}, ["needs", "density"]),
        ("breadcrumbs_ties", {"gamma": 0.9}, ["gamma=0.9", "sum must not exceed 1"]),
    ],
)
def test_bad_keywords_are_refused_in_one_sentence(method, kwargs, words):
    with pytest.raises(ValueError) as error:
        merge_task_vectors(random_vectors(2), method, **kwargs)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("method", MASKED)
def test_small_tensors_take_the_mean(method):
    vectors = random_vectors(2, {"one": (1,), "scalar": (), "n99": (99,), "n100": (100,), "none": (0, 3)})
    kwargs = {**METHODS[method], "density": 0.2, "min_sparse_numel": 100}
    kwargs.update({"epsilon": 0.1} if method.startswith("della") else {})
    merged = merge_task_vectors(vectors, method, [3, 1], ["a", "b"], **kwargs)
    mean = merge_task_vectors(vectors, "mean", [3, 1], ["a", "b"])
    for key in ("one", "scalar", "n99", "none"):
        assert torch.equal(merged[key], mean[key]), key
    assert not torch.equal(merged["n100"], mean["n100"])


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_edges_of_size_and_zero_vectors(method):
    shapes = {"none": (0, 3), "scalar": (), "one": (1,), "column": (5, 1), "row": (1, 5), "cube": (2, 3, 4)}
    vectors = random_vectors(2, shapes)
    merged = merge_task_vectors(vectors, method, **METHODS[method])
    assert {key: tuple(tensor.shape) for key, tensor in merged.items()} == shapes
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    zeros = [{key: torch.zeros(shape) for key, shape in shapes.items()}] * 2
    for tensor in merge_task_vectors(zeros, method, **METHODS[method]).values():
        assert np.array_equal(tensor.numpy(), np.zeros(tensor.shape))
    assert merge_task_vectors([{}, {}], method, names=["a", "b"], **METHODS[method]) == {}


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_neither_order_nor_chunks_nor_company_change_a_bit(method, dtype, monkeypatch):
    vectors, names, weights = random_vectors(4, {"b": (40, 25), "a": (301,)}, dtype=dtype), list("pqrs"), [1, 2, 3, 4]
    rule, kwargs = get_merge_method(method), METHODS[method]
    merged = merge_task_vectors(vectors, method, weights, names, **kwargs)
    assert {tensor.dtype for tensor in merged.values()} == {dtype if dtype == torch.float64 else torch.float32}
    monkeypatch.setattr(chunks, "CHUNK", 128)
    assert_same(merged, merge_task_vectors(vectors[::-1], method, weights[::-1], names[::-1], **kwargs))
    context = rule.find_context(vectors, weights, names, kwargs)
    for key in ("b", "a"):
        alone = rule.function([{key: vector[key]} for vector in vectors], weights, names, **kwargs, **context)
        assert_same(alone, {key: merged[key]})


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_left_as_they_were(method, dtype):
    vectors = random_vectors(3, dtype=dtype)
    before = [{key: tensor.clone() for key, tensor in vector.items()} for vector in vectors]
    merge_task_vectors(vectors, method, **METHODS[method])
    for vector, copy in zip(vectors, before, strict=True):
        assert_same(vector, copy)


# PCB drops what does not compete, in one task as in many.
@pytest.mark.parametrize("method", [method for method in ELEMENTWISE if method != "pcb"])
def test_one_task_that_keeps_everything_is_itself(method):
    parameters = get_merge_method(method).parameters
    everything = {"density": 1.0, "gamma": 0.0, "epsilon": 0.0, "min_sparse_numel": 0}
    kwargs = {name: value for name, value in everything.items() if name in parameters}
    vectors = random_vectors(1)
    assert_same(merge_task_vectors(vectors, method, **kwargs), {key: vectors[0][key] for key in sorted(vectors[0])})
