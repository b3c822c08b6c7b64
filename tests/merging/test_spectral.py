from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import merge_task_vectors

from . import reference
from .testing_utils import as_numpy, random_vectors


def matrices(count, shape, seed=0, rank=None):
    vectors = random_vectors(count, {"w": shape}, seed, torch.float64)
    if rank is not None:
        right = random_vectors(count, {"w": (rank, shape[1])}, seed + 1, torch.float64)
        vectors = [{"w": v["w"][:, :rank] @ r["w"]} for v, r in zip(vectors, right, strict=True)]
    return vectors


def orthogonal_tasks(shape=(10, 8), ranks=(2, 2, 2)):
    """Tasks whose row and column spaces are mutually orthogonal."""
    left = np.linalg.qr(np.random.default_rng(0).normal(size=(shape[0], sum(ranks))))[0]
    right = np.linalg.qr(np.random.default_rng(1).normal(size=(shape[1], sum(ranks))))[0]
    tasks, start = [], 0
    for rank in ranks:
        part = slice(start, start + rank)
        tasks.append({"w": torch.tensor(left[:, part] * np.arange(1.0, rank + 1) @ right[:, part].T)})
        start += rank
    return tasks


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (6, 6)])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, -1.0, 2.0]])
def test_methods_match_the_reference(shape, weights):
    vectors = matrices(3, shape)
    arrays = [v["w"] for v in as_numpy(vectors)]
    merged = merge_task_vectors(vectors, "tsv_m", weights)["w"]
    np.testing.assert_allclose(merged.numpy(), reference.tsv_m(arrays, weights), atol=1e-6)
    merged = merge_task_vectors(vectors, "iso_c", weights)["w"]
    np.testing.assert_allclose(merged.numpy(), reference.iso_c(arrays, weights, min(shape)), atol=1e-6)


def test_float32_inputs_are_decomposed_in_float64():
    vectors = [{"w": v["w"].float()} for v in matrices(2, (10, 6))]
    arrays = [v["w"] for v in as_numpy(vectors)]
    merged = merge_task_vectors(vectors, "tsv_m")["w"]
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged.numpy(), reference.tsv_m(arrays, [1, 1]), atol=1e-6)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
@pytest.mark.parametrize("decades", [1, 5])
def test_float32_agrees_with_the_float64_reference_to_1e5(method, decades):
    # Square and of full rank, the case where a float32 SVD is off by more than 1e-5.
    rng, vectors = np.random.default_rng(0), []
    for _ in range(3):
        left, right = (np.linalg.qr(rng.normal(size=(150, 150)))[0] for _ in range(2))
        vectors.append({"w": torch.tensor(left * np.logspace(0, -decades, 150) @ right.T, dtype=torch.float32)})
    arrays = [v["w"] for v in as_numpy(vectors)]
    spectrum = np.linalg.svd(sum(arrays))[1]
    rank = int((spectrum > 150 * np.finfo(np.float32).eps * spectrum[0]).sum())
    expected = reference.tsv_m(arrays, [1] * 3) if method == "tsv_m" else reference.iso_c(arrays, [1] * 3, rank)
    merged = merge_task_vectors(vectors, method)["w"].double().numpy()
    assert np.linalg.norm(merged - expected) <= 1e-5 * np.linalg.norm(expected)


def test_one_task_is_returned_by_tsv_m():
    vector = {"w": torch.randn(7, 5, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(merge_task_vectors([vector], "tsv_m")["w"], vector["w"])


def test_copies_within_the_rank_budget_are_returned_by_tsv_m():
    vector = matrices(1, (9, 8), rank=2)[0]
    merged = merge_task_vectors([vector] * 4, "tsv_m")["w"]
    np.testing.assert_allclose(merged.numpy(), vector["w"].numpy(), atol=1e-6)


def test_orthogonal_tasks_give_the_sum():
    tasks = orthogonal_tasks()
    total = sum(task["w"] for task in tasks)
    np.testing.assert_allclose(merge_task_vectors(tasks, "tsv_m")["w"].numpy(), total.numpy(), atol=1e-6)


def test_null_vectors_stay_out_of_the_polar_step():
    # Two triplets per task, but rank one each: padding with arbitrary null vectors would change the result.
    tasks = orthogonal_tasks((6, 6), (1, 1, 1))
    total = sum(task["w"] for task in tasks)
    np.testing.assert_allclose(merge_task_vectors(tasks, "tsv_m")["w"].numpy(), total.numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2), (1, 5), (5, 1), (1, 1)])
def test_more_tasks_than_rank(shape):
    vectors = matrices(5, shape)
    arrays = [v["w"] for v in as_numpy(vectors)]
    merged = merge_task_vectors(vectors, "tsv_m")["w"]
    assert float(merged.abs().max()) > 0
    np.testing.assert_allclose(merged.numpy(), reference.tsv_m(arrays, [1] * 5), atol=1e-6)


def test_iso_c_golden():
    vectors = [{"w": torch.diag(torch.tensor([3.0, 0.0]))}, {"w": torch.diag(torch.tensor([0.0, -1.0]))}]
    torch.testing.assert_close(merge_task_vectors(vectors, "iso_c")["w"], torch.diag(torch.tensor([2.0, -2.0])))


def test_iso_c_is_homogeneous():
    vectors = matrices(3, (8, 5))
    scaled = [{"w": 0.37 * v["w"]} for v in vectors]
    left, right = merge_task_vectors(scaled, "iso_c")["w"], 0.37 * merge_task_vectors(vectors, "iso_c")["w"]
    torch.testing.assert_close(left, right, atol=1e-9, rtol=0)


def test_iso_c_spectrum_and_exponent():
    vectors = matrices(2, (8, 6))
    total = vectors[0]["w"] + vectors[1]["w"]
    spectrum = np.linalg.svd(total.numpy())[1]
    for a in (0.0, 0.5, 1.0):
        merged = merge_task_vectors(vectors, "iso_c", a=a)["w"]
        values = np.linalg.svd(merged.numpy())[1]
        np.testing.assert_allclose(values, spectrum**a * spectrum.sum() / (spectrum**a).sum(), rtol=1e-7)
    assert torch.equal(merge_task_vectors(vectors, "iso_c", a=1.0)["w"], total)


def test_iso_c_rank_rules_on_a_rank_deficient_sum():
    vectors = matrices(1, (8, 6), rank=2)
    nuclear = np.linalg.svd(vectors[0]["w"].numpy())[1].sum()
    numerical = np.linalg.svd(merge_task_vectors(vectors, "iso_c")["w"].numpy())[1]
    full = np.linalg.svd(merge_task_vectors(vectors, "iso_c", rank_rule="full")["w"].numpy())[1]
    np.testing.assert_allclose(numerical, [nuclear / 2] * 2 + [0] * 4, atol=1e-9)
    np.testing.assert_allclose(full, [nuclear / 6] * 6, atol=1e-9)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_everything_but_matrices_takes_the_mean(method):
    shapes = {
        "layer.weight": (6, 4),
        "layer.bias": (6,),
        "conv.weight": (3, 2, 2, 2),
        "embeddings.word_embeddings.weight": (5, 4),
        "lm_head.weight": (5, 4),
        "special.table": (3, 3),
    }
    vectors, weights = random_vectors(3, shapes), [1.0, 2.0, 1.0]
    mean = merge_task_vectors(vectors, "mean", weights)
    merged = merge_task_vectors(vectors, method, weights)
    same = {key for key in shapes if torch.equal(merged[key], mean[key])}
    assert same == set(shapes) - {"layer.weight", "special.table"}
    merged = merge_task_vectors(vectors, method, weights, non_matrix=["special.*"])
    same = {key for key in shapes if torch.equal(merged[key], mean[key])}
    assert same == {"layer.bias", "conv.weight", "special.table"}


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_zero_matrices_stay_zero_and_do_not_disturb(method):
    zero, full = {"w": torch.zeros(5, 4)}, {"w": torch.diag(torch.ones(5))[:, :4] * 2}
    assert torch.equal(merge_task_vectors([zero, zero], method)["w"], torch.zeros(5, 4))
    assert torch.isfinite(merge_task_vectors([zero, full], method)["w"]).all()


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_transposed_layouts_merge_alike(method):
    vectors = matrices(3, (8, 5))
    flipped = [{"w": v["w"].T.contiguous()} for v in vectors]
    left, right = (merge_task_vectors(v, method, names=list("abc"))["w"] for v in (vectors, flipped))
    torch.testing.assert_close(left, right.T, atol=1e-9, rtol=0)
