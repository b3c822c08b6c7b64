"""Diagnostics beside independent references in NumPy, float64, written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_atm.analysis import count_signs, diagnose, effective_rank, singular_task_interference
from hf_atm.analysis.interference import dominant_basis, leading_factors, subspace_alignment


TASKS = ("a", "b", "c")


def vectors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (12, 7), "conv.weight": (6, 2, 3, 3), "bias": (9,), "embed.weight": (20, 5)}
    return {
        task: {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
        for task in TASKS
    }


def flat(vector):
    return np.concatenate([vector[name].double().numpy().ravel() for name in sorted(vector)])


def top(array, density):
    count = int(density * array.size)
    kept = np.zeros(array.size, dtype=bool)
    kept[np.argsort(-np.abs(array.ravel()), kind="stable")[:count]] = True
    return kept


def reference_interference(matrices):
    rank = max(1, min(matrices[0].shape) // len(matrices))
    parts = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    u = np.concatenate([p[0][:, :rank] for p in parts], 1)
    s = np.concatenate([p[1][:rank] for p in parts])
    v = np.concatenate([p[2][:rank].T for p in parts], 1)
    one = np.eye(len(s))
    return np.abs((u.T @ u - one) @ np.diag(s) @ (v.T @ v - one)).sum()


def test_norms_and_cosines():
    given = vectors()
    result = diagnose(given, level="cheap")
    arrays = {task: flat(given[task]) for task in TASKS}
    for a in TASKS:
        assert result.norms[a] == pytest.approx(np.linalg.norm(arrays[a]), rel=1e-12)
        for b in TASKS:
            cosine = arrays[a] @ arrays[b] / np.linalg.norm(arrays[a]) / np.linalg.norm(arrays[b])
            assert result.cosines[a][b] == pytest.approx(cosine, abs=1e-12)
    norms = [np.linalg.norm(array) for array in arrays.values()]
    assert result.norm_dispersion == pytest.approx(max(norms) / min(norms), rel=1e-12)
    assert result.interference is None and result.sign_conflict is None
    bias = [given[task]["bias"].double().numpy() for task in TASKS]
    pairs = [
        bias[i] @ bias[j] / np.linalg.norm(bias[i]) / np.linalg.norm(bias[j]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert result.layers["bias"].cosine == pytest.approx(np.mean(pairs), abs=1e-12)


def test_signs_among_the_largest_entries():
    given = vectors()
    result = diagnose(given, density=0.3)
    entries = shared = conflicting = 0
    for name in given["a"]:
        arrays = [given[task][name].numpy().ravel() for task in TASKS]
        held = np.stack([np.sign(array) * top(array, 0.3) for array in arrays])
        both = (held != 0).sum(0) > 1
        differ = (held > 0).any(0) & (held < 0).any(0)
        assert result.layers[name].sign_conflict == pytest.approx(differ.mean())
        assert result.layers[name].sign_overlap == pytest.approx(both.mean())
        entries, shared, conflicting = entries + both.size, shared + both.sum(), conflicting + differ.sum()
    assert result.sign_conflict == pytest.approx(conflicting / entries)
    assert result.sign_overlap == pytest.approx(shared / entries) and result.sign_conflict > 0.05


def test_signs_of_large_tensors_and_of_zeros():
    generator = torch.Generator().manual_seed(1)
    pair = [torch.randn(300_000, generator=generator) for _ in range(2)]
    counts = count_signs(pair, 0.2)
    kept = [top(tensor.numpy(), 0.2) for tensor in pair]
    both = kept[0] & kept[1]
    assert counts.shared == both.sum()
    assert counts.conflicting == (both & (pair[0] * pair[1] < 0).numpy()).sum()
    nothing = count_signs([torch.zeros(50), torch.zeros(50)])
    assert (nothing.entries, nothing.shared, nothing.conflicting) == (50, 0, 0)
    assert count_signs([torch.zeros(0), torch.zeros(0)]).overlap == 0.0


def test_interference_alignment_and_rank():
    given = vectors()
    result = diagnose(given)
    found, squares, projections = [], np.zeros(3), np.zeros(3)
    for name in ("conv.weight", "up.weight"):
        matrices = [given[task][name].double().numpy().reshape(given[task][name].shape[0], -1) for task in TASKS]
        layer = result.layers[name]
        assert layer.interference == pytest.approx(reference_interference(matrices), rel=1e-9)
        u, s, _ = np.linalg.svd(sum(matrices), full_matrices=False)
        p = s**2 / (s**2).sum()
        assert layer.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        rank = next(k for k in range(1, len(s) + 1) if np.sqrt((s[k:] ** 2).sum()) <= 0.05 * np.sqrt((s**2).sum()))
        for i, (task, matrix) in enumerate(zip(TASKS, matrices, strict=True)):
            inside = np.linalg.norm(u[:, :rank] @ u[:, :rank].T @ matrix)
            assert layer.alignment[task] == pytest.approx(inside / np.linalg.norm(matrix), abs=1e-7)
            squares[i] += np.linalg.norm(matrix) ** 2
            projections[i] += inside**2
        found.append(layer.interference)
    assert result.interference == pytest.approx(np.mean(found))
    assert list(result.alignment.values()) == pytest.approx(list(np.sqrt(projections / squares)), abs=1e-7)
    assert result.layers["bias"].interference is None and result.layers["embed.weight"].interference is None


def test_interference_vanishes_for_orthogonal_tasks_only():
    left, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    tasks = [left[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ torch.eye(8)[:3].double()]
    tasks.append(left[:, 4:7] @ torch.eye(8)[:3].double())
    assert singular_task_interference(leading_factors(tasks)) == pytest.approx(0, abs=1e-9)
    assert singular_task_interference(leading_factors([tasks[0], tasks[0]])) > 5


def test_a_subspace_of_one_task_leaves_the_other_out():
    one, other = torch.zeros(4, 4), torch.zeros(4, 4)
    one[0, 0], other[1, 1] = 1.0, 0.001
    result = diagnose({"one": {"w": one}, "other": {"w": other}})
    assert result.alignment == pytest.approx({"one": 1.0, "other": 0.0}, abs=1e-6)
    assert result.effective_rank == pytest.approx(1.0, abs=1e-4)
    basis = dominant_basis((torch.zeros(4, 0), torch.zeros(0), torch.zeros(4, 0)))
    assert basis.shape == (4, 0) and subspace_alignment([torch.zeros(4, 4)], basis) == [0.0]


@pytest.mark.parametrize(("values", "rank"), [([2.0, 2.0, 2.0], 3.0), ([5.0, 0.0], 1.0), ([0.0], 0.0), ([], 0.0)])
def test_effective_rank_counts_equal_directions(values, rank):
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank)


def test_a_merged_update_of_ones_own():
    given = vectors()
    merged = {name: given["a"][name] for name in given["a"]}
    result = diagnose(given, merged)
    assert result.alignment["a"] == pytest.approx(1.0, abs=2e-3) and result.alignment["b"] < 0.99
    scaled = diagnose(given, {name: 7 * tensor for name, tensor in merged.items()})
    assert scaled.effective_rank == pytest.approx(result.effective_rank, rel=1e-6)


def test_order_type_and_single_tasks():
    given = vectors()
    seen = []
    expected = diagnose(given, report=seen.append).to_dict()
    assert diagnose(dict(reversed(given.items()))).to_dict() == expected and seen == sorted(given["a"])
    assert diagnose(given, threads=3).to_dict() == expected
    half = {task: {name: t.bfloat16() for name, t in vector.items()} for task, vector in given.items()}
    whole = {task: {name: t.float() for name, t in vector.items()} for task, vector in half.items()}
    assert diagnose(half).norms == diagnose(whole).norms
    alone = diagnose({"a": given["a"]})
    assert alone.cosines == {"a": {"a": 1.0}} and alone.interference == pytest.approx(0, abs=1e-9)
    assert diagnose({"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(2)}}).norm_dispersion is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.clear(), "task_vectors is empty"),
        (lambda v: v["b"].pop("bias"), "differ in the tensors they have: 'bias'"),
        (lambda v: v["b"].update(bias=torch.ones(4)), r"shape \[9\] in task vector 'a' and \[4\] in 'b'"),
        (lambda v: v["c"].update(bias=torch.full((9,), math.nan)), "'bias' of task vector 'c' holds NaN"),
    ],
)
def test_refuses(change, message):
    given = vectors()
    change(given)
    with pytest.raises(ValueError, match=message):
        diagnose(given)


def test_refuses_an_unknown_level():
    with pytest.raises(ValueError, match="cheap, full, not 'deep'"):
        diagnose(vectors(), level="deep")
