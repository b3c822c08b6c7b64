from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hf_atm.merging import get_merge_method, gram, merge_task_vectors, solve_gram

from . import reference_gram as reference
from .testing_utils import assert_same, random_vectors


SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1), (1, 1)]


def arrays(count, shape, seed=0):
    return list(np.random.default_rng(seed).normal(size=(count, *shape)))


def as_tasks(matrices):
    return [{"w": torch.as_tensor(matrix)} for matrix in matrices]


def merge(method, matrices, weights=None, **kwargs):
    return merge_task_vectors(as_tasks(matrices), method, weights, **kwargs)["w"].numpy()


def positive_matrix(size):
    rows = torch.tensor(arrays(1, (size + 3, size))[0])
    return rows.T @ rows


def orthogonal_tasks(rows, ranks):
    """Tasks whose row spaces are mutually orthogonal."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(sum(ranks) + 1, sum(ranks) + 1)))[0]
    ends = np.cumsum(ranks)
    return [rng.normal(size=(rows, rank)) @ basis[end - rank : end] for rank, end in zip(ranks, ends, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, -1.0, 2.0]])
def test_wudi_matches_the_reference(shape, weights):
    matrices = arrays(3, shape)
    weighted = [w * m for w, m in zip(weights, matrices, strict=True)]
    np.testing.assert_allclose(merge("wudi", matrices, weights), reference.wudi(weighted), atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 9), (9, 5)])
def test_wudi_is_the_minimum(shape):
    matrices = arrays(2, shape)
    merged = merge("wudi", matrices)
    assert np.abs(reference.interference_gradient(merged, matrices)).max() < 1e-9
    lowest = reference.interference(merged, matrices)
    assert lowest < 0.9 * reference.interference(sum(matrices), matrices)
    assert lowest < 0.9 * reference.interference(sum(matrices) / 2, matrices)


@pytest.mark.parametrize("time", [0.3, 2.0, 20.0])
def test_finite_times_are_gradient_flow(time):
    matrices = arrays(3, (4, 7))
    merged = merge("swudi", matrices, flow_time=time, rank=7)
    np.testing.assert_allclose(merged, reference.flow(matrices, time), atol=1e-8)


def test_flow_begins_at_the_sum_and_ends_at_the_minimum():
    matrices = arrays(2, (4, 7))
    np.testing.assert_allclose(merge("swudi", matrices, flow_time=1e-12, rank=7), sum(matrices), atol=1e-10)
    late = merge("swudi", matrices, flow_time=1e9, rank=7)
    np.testing.assert_allclose(late, merge("wudi", matrices), atol=1e-8)
    np.testing.assert_allclose(merge("swudi", matrices, rank=100), merge("wudi", matrices), atol=1e-8)


@pytest.mark.parametrize("time", [math.inf, 1.5])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_swudi_matches_the_reference(time, rank):
    matrices = arrays(3, (4, 7))
    merged = merge("swudi", matrices, flow_time=time, rank=rank)
    np.testing.assert_allclose(merged, reference.swudi(matrices, time, rank), atol=1e-9)


def test_default_rank_is_the_participation_ratio():
    matrices = arrays(3, (4, 7))
    values = np.linalg.eigvalsh(reference.gram_sum(matrices))
    rank = int(values.sum() ** 2 / (values**2).sum())
    assert 1 < rank < 7
    np.testing.assert_allclose(merge("swudi", matrices), reference.swudi(matrices, math.inf, rank), atol=1e-9)


def test_equal_eigenvalues_all_count():
    # C is a multiple of the identity, whose participation ratio is n exactly.
    turns = [np.linalg.qr(m)[0] for m in arrays(2, (6, 6))]
    np.testing.assert_allclose(merge("swudi", turns), sum(turns) / 2, atol=1e-9)


def test_trace_of_the_gram_matrix_is_the_number_of_tasks():
    _, total, _ = gram._interference_terms(torch.tensor(scale * m) for scale, m in enumerate(arrays(6, (4, 7))))
    assert float(total.trace()) == pytest.approx(5, rel=1e-12)
    np.testing.assert_allclose(total.numpy(), total.numpy().T, atol=1e-15)


@pytest.mark.parametrize("method", ["wudi", "swudi"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3)])
def test_orthogonal_row_spaces_give_the_sum(method, ranks):
    tasks = orthogonal_tasks(4, ranks)
    np.testing.assert_allclose(merge(method, tasks), sum(tasks), atol=1e-9)


def test_equal_gram_matrices_give_the_mean():
    # Turned on the output side, tasks keep their Gram matrices.
    first = arrays(1, (8, 5))[0]
    turns = [np.linalg.qr(m)[0] for m in arrays(3, (8, 8), seed=1)]
    tasks = [turn @ first for turn in turns]
    np.testing.assert_allclose(merge("wudi", tasks), sum(tasks) / 3, atol=1e-9)
    np.testing.assert_allclose(merge("wudi", [first] * 4), first, atol=1e-9)


@pytest.mark.parametrize("method", ["wudi", "swudi"])
def test_one_task_and_zero_tasks(method):
    vector = random_vectors(1)[0]
    assert_same(merge_task_vectors([vector], method), vector)
    wide = {key: tensor.double() for key, tensor in vector.items()}
    merged = merge_task_vectors([wide], method)
    assert_same(merged, wide)
    assert not {tensor.data_ptr() for tensor in wide.values()} & {tensor.data_ptr() for tensor in merged.values()}
    zero = {key: torch.zeros_like(tensor) for key, tensor in vector.items()}
    assert_same(merge_task_vectors([zero, zero], method), zero)
    # A task that changed nothing disturbs none of the matrices.
    merged = merge_task_vectors([vector, zero], method)["layer.weight"]
    torch.testing.assert_close(merged, vector["layer.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["wudi", "swudi"])
def test_everything_but_matrices_takes_the_mean(method):
    vectors, weights = random_vectors(3), [1.0, 2.0, 1.0]
    mean, merged = merge_task_vectors(vectors, "mean", weights), merge_task_vectors(vectors, method, weights)
    assert {key for key in mean if not torch.equal(merged[key], mean[key])} == {"layer.weight"}
    merged = merge_task_vectors(vectors, method, weights, non_matrix=["layer.*"])
    assert {key for key in mean if not torch.equal(merged[key], mean[key])} == {"embed.weight"}


@pytest.mark.parametrize("method", ["wudi", "swudi"])
def test_transposed_layouts_merge_alike(method):
    shapes = {"h.c_fc.weight": (5, 9), "h.c_fc.bias": (9,), "h.c_proj.weight": (6, 6)}
    vectors = random_vectors(3, shapes, dtype=torch.float64)
    flipped = [{key: value.T.contiguous() if value.ndim == 2 else value for key, value in v.items()} for v in vectors]
    names = list("abc")
    left, right = (merge_task_vectors(v, method, names=names) for v in (vectors, flipped))
    for key in ("h.c_fc.weight", "h.c_proj.weight"):
        torch.testing.assert_close(left[key], right[key].T, atol=1e-9, rtol=0)
        assert left[key].is_contiguous()
    # Patterns overrule what the shapes say, and the input side matters.
    other = merge_task_vectors(vectors, method, names=names, transposed=[])
    assert not torch.allclose(other["h.c_fc.weight"], left["h.c_fc.weight"], atol=0.1)
    again = merge_task_vectors(vectors, method, names=names, transposed=["h.*"])
    torch.testing.assert_close(again["h.c_fc.weight"], left["h.c_fc.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("method", ["wudi", "swudi"])
def test_one_tensor_at_a_time_gives_the_same(method):
    shapes = {"h.c_fc.weight": (5, 9), "h.c_fc.bias": (9,), "h.c_proj.weight": (6, 6), "fc.weight": (4, 8)}
    vectors, names, weights = random_vectors(2, shapes), ["x", "y"], [1.0, 2.0]
    rule = get_merge_method(method)
    context = rule.find_context(vectors, weights, names, {})
    whole = rule.function(vectors, weights, names)
    for key in whole:
        alone = rule.function([{key: vector[key]} for vector in vectors], weights, names, **context)
        assert torch.equal(alone[key], whole[key]), key


@pytest.mark.parametrize("method", ["wudi", "swudi"])
def test_permuted_inputs_are_bit_equal(method):
    vectors, weights, names = random_vectors(3, {"w": (9, 30)}), [0.3, 0.1, 0.7], ["x", "y", "z"]
    results = [
        merge_task_vectors([vectors[i] for i in o], method, [weights[i] for i in o], [names[i] for i in o])
        for o in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("method", ["wudi", "swudi"])
def test_float32_inputs_are_solved_in_float64(method):
    matrices = [m.astype(np.float32) for m in arrays(2, (30, 20))]
    exact = merge(method, [m.astype(np.float64) for m in matrices])
    np.testing.assert_array_equal(merge(method, matrices), exact.astype(np.float32))


def test_factorisation_and_eigenvectors_agree(monkeypatch):
    matrices = arrays(2, (8, 12))
    fast = merge("wudi", matrices)

    def fail(*_):
        raise AssertionError("this matrix needs no eigenvectors")

    with monkeypatch.context() as patch:
        patch.setattr(gram, "leading_eigh", fail)
        np.testing.assert_array_equal(merge("wudi", matrices), fast)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (matrix, torch.tensor(1)))
    np.testing.assert_allclose(merge("wudi", matrices), fast, atol=1e-9)


def test_directions_without_weight_keep_the_start():
    """Eigenvalues of 1, 1e-3 and below the noise of single precision: an inverse must not blow the last ones up."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    matrix = torch.tensor(basis * np.array([1, 1e-3, 1e-9, 0]) @ basis.T)
    initial, goal = torch.tensor(rng.normal(size=(3, 4))), torch.tensor(rng.normal(size=(3, 4)))
    found = gram.solve_least_squares(initial, matrix, goal @ matrix)
    turned, q = (goal - initial).numpy() @ basis, (found - initial).numpy() @ basis
    np.testing.assert_allclose(q, turned * np.array([1, 1, 0, 0]), atol=1e-8)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_ridge_pulls_towards_the_start(ridge):
    matrix = positive_matrix(5)
    initial, goal = (torch.tensor(m) for m in arrays(2, (3, 5), seed=1))
    found = gram.solve_least_squares(initial, matrix, goal @ matrix, ridge)
    shift = ridge * float(matrix.trace()) / 5 * torch.eye(5, dtype=torch.float64)
    expected = (goal @ matrix + initial @ shift) @ torch.linalg.inv(matrix + shift)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    filtered = solve_gram(initial, matrix, goal @ matrix, lambda values: 1 / (values + shift[0, 0]))
    torch.testing.assert_close(found, filtered, atol=1e-10, rtol=0)


@pytest.mark.parametrize("count", [2, 6])
def test_singular_vectors_take_over_when_the_eigensolver_fails(monkeypatch, count):
    matrix = positive_matrix(6)
    initial, moment = torch.zeros(2, 6, dtype=torch.float64), torch.tensor(arrays(1, (2, 6), seed=1)[0])
    expected = solve_gram(initial, matrix, moment, lambda values: 1 / values, count)

    def fail(*_):
        raise np.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(gram, "leading_eigh", fail)
    found = solve_gram(initial, matrix, moment, lambda values: 1 / values, count)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("swudi", {"flow_time": 0}, ["flow_time=0", "positive"]),
        ("swudi", {"flow_time": float("nan")}, ["flow_time=nan"]),
        ("swudi", {"rank": 0}, ["rank=0", "at least 1"]),
        ("swudi", {"rank": 1.5}, ["rank=1.5"]),
        ("wudi", {"transposed": "h.*"}, ["transposed='h.*'", "list"]),
        ("wudi", {"non_matrix": "h.*"}, ["non_matrix='h.*'"]),
        ("wudi", {"context": frozenset()}, ["'context'"]),
        ("wudi", {"weights": [1, -1]}, ["sum to zero"]),
    ],
)
def test_bad_input_is_refused_in_one_sentence(method, arguments, words):
    with pytest.raises(ValueError) as error:
        merge_task_vectors(random_vectors(2), method, **arguments)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message
