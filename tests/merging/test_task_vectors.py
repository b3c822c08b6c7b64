from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from hf_atm.merging import list_merge_methods, merge_task_vectors, norm_scale
from hf_atm.merging.tensors import canonical_tasks

from .testing_utils import METHODS, SPECIAL_METHODS, assert_same, random_vectors


SCRIPT = """
import hashlib, json, sys
import torch
import hf_atm.merging as merging
heavy = sorted(name for name in ("transformers", "peft") if name in sys.modules)
generator = torch.Generator().manual_seed(0)
shapes = {"b": (12, 7), "a": (12,), "c": (150,)}
vectors = [{k: torch.randn(s, generator=generator) for k, s in shapes.items()} for _ in range(3)]
digests = {}
for method, kwargs in json.loads(sys.argv[1]).items():
    merged = merging.merge_task_vectors(vectors, method, **kwargs)
    digests[method] = hashlib.sha256(b"".join(t.numpy().tobytes() for t in merged.values())).hexdigest()
print(json.dumps([heavy, digests]))
"""


def run_script(hash_seed):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(METHODS)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout)


def test_processes_and_hash_seeds_agree_and_nothing_heavy_is_imported():
    (heavy, first), (_, second) = run_script("1"), run_script("2")
    assert heavy == []
    assert first == second and sorted([*first, *SPECIAL_METHODS]) == list_merge_methods()


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("named", [True, False])
def test_permuted_inputs_are_bit_equal(method, named):
    vectors, weights, names = random_vectors(3), [0.3, 0.1, 0.7], ["x", "y", "z"]
    results = []
    for order in itertools.permutations(range(3)):
        results.append(
            merge_task_vectors(
                [vectors[i] for i in order],
                method,
                [weights[i] for i in order],
                [names[i] for i in order] if named else None,
                scaling_coefficient="norm",
                **METHODS[method],
            )
        )
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_permuted_copies_with_different_weights_are_bit_equal(method):
    vector = random_vectors(1)[0]
    left = merge_task_vectors([vector, vector], method, [0.3, 0.9], **METHODS[method])
    assert_same(left, merge_task_vectors([vector, vector], method, [0.9, 0.3], **METHODS[method]))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_copies_return_the_vector_itself(count):
    vector = random_vectors(1)[0]
    for method, kwargs in (("mean", {}), ("dare", {"density": 1.0}), ("ties", {"density": 1.0})):
        assert_same(merge_task_vectors([vector] * count, method, **kwargs), vector)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_inputs_are_unchanged_and_output_is_new(method):
    vectors = random_vectors(2)
    copies = [{key: tensor.clone() for key, tensor in vector.items()} for vector in vectors]
    for inputs in (vectors, vectors[:1]):
        merged = merge_task_vectors(inputs, method, **METHODS[method])
        assert list(merged) == sorted(vectors[0])
        for tensor in merged.values():
            assert not tensor.requires_grad
            tensor.add_(1.0)
    for vector, copy in zip(vectors, copies, strict=True):
        assert_same(vector, copy)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_output_types(method):
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        merged = merge_task_vectors(random_vectors(2, dtype=dtype), method, **METHODS[method])
        assert {tensor.dtype for tensor in merged.values()} == {expected}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_parameters_with_gradient_history_are_accepted(method):
    vectors = [{"w": torch.nn.Parameter(torch.randn(10, 12))} for _ in range(2)]
    assert not merge_task_vectors(vectors, method, **METHODS[method])["w"].requires_grad


def test_norm_scale_golden():
    assert norm_scale([3.0, 4.0], 5.0) == pytest.approx((12.5**0.5) / 5)
    assert norm_scale([1.0, 2.0], 0.0) == 1.0
    assert norm_scale([], 1.0) == 1.0


def test_norm_rule_restores_the_typical_length():
    eye = torch.eye(8)
    vectors = [{"w": eye[index] * 2.0} for index in range(8)]
    merged = merge_task_vectors(vectors, scaling_coefficient="norm")
    assert float(merged["w"].norm()) == pytest.approx(2.0)
    assert merged["w"][0].item() == pytest.approx(2.0 / 8**0.5)
    # A task of weight zero does not count.
    merged = merge_task_vectors([*vectors, {"w": eye[0] * 100}], weights=[1] * 8 + [0], scaling_coefficient="norm")
    assert float(merged["w"].norm()) == pytest.approx(2.0)
    cancelled = [{"w": eye}, {"w": -eye}]
    assert torch.equal(merge_task_vectors(cancelled, scaling_coefficient="norm")["w"], torch.zeros(8, 8))


def error_of(*args, **kwargs):
    with pytest.raises(ValueError) as error:
        merge_task_vectors(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_inputs_are_named():
    good, other = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "c": torch.ones(3)}
    message = error_of([good, other])
    assert "'b'" in message and "'c'" in message and "'a'" not in message
    message = error_of([good, {"a": torch.ones(2), "b": torch.ones(4)}], names=["first", "second"])
    assert "'b'" in message and "(3,)" in message and "(4,)" in message and "second" in message
    message = error_of([good, {**good, "b": torch.tensor([1.0, float("nan"), 0.0])}], names=["first", "second"])
    assert "'b'" in message and "'second'" in message
    assert "'b'" in error_of([{**good, "b": torch.tensor([float("inf")])}])
    assert "int64" in error_of([{"ids": torch.arange(3)}])
    assert "empty" in error_of([])


def test_bad_weights_and_names():
    vectors = random_vectors(2)
    assert "3 weights for 2" in error_of(vectors, weights=[1, 1, 1])
    assert "1 names for 2" in error_of(vectors, names=["a"])
    assert "'a'" in error_of(vectors, names=["a", "a"])
    assert "finite" in error_of(vectors, weights=[1, float("nan")])
    for method in ("mean", "dare", "breadcrumbs", "tsv_m"):
        kwargs = {"density": 0.5} if method in ("dare", "breadcrumbs") else {}
        assert "sum to zero" in error_of(vectors, method, weights=[1, -1], **kwargs)
    merged = merge_task_vectors(vectors, "task_arithmetic", weights=[1, -1])
    torch.testing.assert_close(merged["scale"], vectors[0]["scale"] - vectors[1]["scale"])
    zero = merge_task_vectors(vectors, "task_arithmetic", weights=[0, 0])
    assert all(not tensor.any() for tensor in zero.values())


def test_transposed_views_are_laid_out_once():
    vectors = [random_vectors(1, {"w": (30, 70)}, seed=seed)[0] for seed in range(2)]
    turned = [{"w": vector["w"].T.contiguous().T} for vector in vectors]
    tasks = canonical_tasks(turned, [1, 1], ["a", "b"])
    # A view would be copied whole for every chunk that is read of it.
    assert not turned[0]["w"].is_contiguous() and all(task.tensors["w"].is_contiguous() for task in tasks)
    assert_same(merge_task_vectors(turned, "ties"), merge_task_vectors(vectors, "ties"))
