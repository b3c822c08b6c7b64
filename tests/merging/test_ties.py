from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import get_merge_method, merge_task_vectors
from hf_atm.merging.elementwise import chunks

from . import reference
from .testing_utils import as_numpy, assert_near, assert_same, random_vectors


ALL = {"min_sparse_numel": 0}


def tensors(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def test_ties_golden_by_hand():
    # Keep 3 of 5. First: -4, 3, 2. Second: 5, -3, -2 (its -2 stays before the equal 2: lowest index).
    first, second = [3.0, -4.0, 2.0, 1.0, 0.5], [5.0, -0.1, -2.0, -3.0, 2.0]
    # Sums of trimmed values: 8, -4, 0, -3, 0. Index 2 is a draw; elected + - 0 - 0 sum to -1: it goes to minus.
    merged = merge_task_vectors(tensors(first, second), "ties", density=0.6, names=["a", "b"], **ALL)
    assert merged["w"].tolist() == [4.0, -4.0, -2.0, -3.0, 0.0]
    merged = merge_task_vectors(tensors(first, second), "ties", density=0.6, merge_func="sum", **ALL)
    assert merged["w"].tolist() == [8.0, -4.0, -2.0, -3.0, 0.0]
    merged = merge_task_vectors(tensors(first, second), "ties", density=0.6, merge_func="max", **ALL)
    assert merged["w"].tolist() == [5.0, -4.0, -2.0, -3.0, 0.0]


def test_ties_vote_by_value_or_by_head_count():
    rows = tensors([5.0], [-1.0], [-1.5])
    assert merge_task_vectors(rows, "ties", density=1.0, **ALL)["w"].tolist() == [5.0]
    by_count = merge_task_vectors(rows, "ties", density=1.0, majority_sign_method="frequency", **ALL)
    assert by_count["w"].tolist() == [-1.25]
    # Weights move the values always, the vote only on request; the divisor is the agreeing weight.
    weights = [0.1, 1.0, 3.0]
    assert merge_task_vectors(rows, "ties", weights, density=1.0, **ALL)["w"].tolist() == [5.0]
    weighted = merge_task_vectors(rows, "ties", weights, density=1.0, weighted_vote=True, **ALL)
    assert weighted["w"].item() == pytest.approx(-(1.0 + 4.5) / 4.0)


def test_negative_weights_count_by_size_in_the_divisor():
    # A signed divisor of 3 - 1 would give (6 - 4) / 2, and weights 1.1 and -1 would exceed every input.
    assert merge_task_vectors(tensors([2.0], [4.0]), "ties", [3, -1], density=1.0, **ALL)["w"].tolist() == [0.5]


def test_ties_draw_takes_the_majority_of_its_scope():
    vectors = [
        {"a": torch.tensor([1.0]), "b": torch.tensor([-2.0, -2.0])},
        {"a": torch.tensor([-1.0]), "b": torch.tensor([-2.0, -2.0])},
    ]
    model = merge_task_vectors(vectors, "ties", density=1.0, trim_scope="model", **ALL)
    tensor = merge_task_vectors(vectors, "ties", density=1.0, trim_scope="tensor", **ALL)
    assert model["a"].item() == -1.0
    assert tensor["a"].item() == 1.0


def test_ties_drops_exactly_even_when_everything_is_equal():
    vectors = [{"a": torch.ones(5), "b": torch.ones(5)}]
    merged = merge_task_vectors(vectors, "ties", density=0.7, **ALL)
    assert merged["a"].tolist() == [1.0] * 5 and merged["b"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("vote", ["total", "frequency"])
@pytest.mark.parametrize("func", ["mean", "sum", "max"])
def test_ties_matches_the_reference(scope, vote, func, dtype):
    # An even number of tasks makes frequency draws; bfloat16 makes ties at the threshold.
    vectors, weights = random_vectors(4, dtype=dtype), [1.0, 0.5, 2.0, 1.0]
    merged = merge_task_vectors(
        vectors, "ties", weights, names=list("abcd"), density=0.35, trim_scope=scope, majority_sign_method=vote,
        merge_func=func, **ALL,
    )  # fmt: skip
    expected = reference.ties(as_numpy(vectors), weights, 0.35, scope, vote, func)
    assert_near(merged, expected, 1e-6)


def test_trim_scope_with_scales_ten_to_one():
    generator = torch.Generator().manual_seed(0)
    large, small = (scale * (1 + torch.rand(100, generator=generator)) for scale in (10.0, 1.0))
    vectors = [{"large": large, "small": small}]
    kept = {}
    for scope in ("model", "tensor"):
        merged = merge_task_vectors(vectors, "ties", density=0.2, trim_scope=scope)
        kept[scope] = (int((merged["large"] != 0).sum()), int((merged["small"] != 0).sum()))
    assert kept == {"model": (40, 0), "tensor": (20, 20)}


# What each peer's TIES makes of these, by hand from its code: magnitudes 4 3 2 1 and, in the second, 5 4 2 1.
PEER_ROWS = ([4.0, -3.0, 2.0, 1.0], [-2.0, 5.0, 1.0, -4.0])


def test_ties_as_in_mergekit():
    # mergekit 0.1 (`generalized_task_arithmetic`, `sparsify.magnitude`): floor(density * n) per tensor, the vote is
    # the sum of the weighted values and draws are plus, the divisor is the sum of the agreeing weights.
    # Trimmed and weighted by 1 and 0.5: 4 -3 0 0 and 0 2.5 0 -2; signs + - + -.
    merged = merge_task_vectors(
        tensors(*PEER_ROWS), "ties", [1.0, 0.5], density=0.5, trim_scope="tensor", weighted_vote=True, **ALL
    )
    assert merged["w"].tolist() == [4.0, -3.0, 0.0, -4.0]


def test_ties_as_in_peft():
    # PEFT 0.21 (`merge_utils.ties`): floor(density * n) per tensor, the vote ignores the weights, the weighted values
    # are divided by how many agree: at equal weights w this is w times ours. Trimmed: 4 -3 0 0 and 0 5 0 -4; + + + -.
    merged = merge_task_vectors(tensors(*PEER_ROWS), "ties", [0.5, 0.5], density=0.5, trim_scope="tensor", **ALL)
    assert merged["w"].tolist() == [4.0, 5.0, 0.0, -4.0]
    assert (0.5 * merged["w"]).tolist() == [2.0, 2.5, 0.0, -2.0]
    # By head count the second entry is a draw, plus there; here it takes the majority sign (+ 0 0 -: plus).
    merged = merge_task_vectors(
        tensors(*PEER_ROWS), "ties", density=0.5, trim_scope="tensor", majority_sign_method="frequency", **ALL
    )
    assert merged["w"].tolist() == [4.0, 5.0, 0.0, -4.0]


def test_ties_as_in_the_paper_and_fusion_bench():
    # The authors' code and FusionBench's copy of it: entries of at least the (n - floor(density * n))-th smallest
    # magnitude of the model, which is one entry more than floor(density * n); draws take the majority sign.
    # At density 0.25 two entries each: 4 -3 | 0 0 and 0 5 | 0 -4, signs + + | 0 - with majority plus.
    vectors = [{"a": torch.tensor(row[:2]), "b": torch.tensor(row[2:])} for row in PEER_ROWS]
    total = merge_task_vectors(vectors, "ties", density=0.5, merge_func="sum", **ALL)
    assert total["a"].tolist() == [4.0, 5.0] and total["b"].tolist() == [0.0, -4.0]
    # At density 0.5 three: 4 -3 | 2 0 and -2 5 | 0 -4, signs + + | + -; FusionBench sums, the paper takes the mean.
    total = merge_task_vectors(vectors, "ties", density=0.75, merge_func="sum", **ALL)
    assert total["a"].tolist() == [4.0, 5.0] and total["b"].tolist() == [2.0, -4.0]
    same = [{"a": 2 * vector["a"], "b": vector["b"]} for vector in vectors[:1] * 2]
    assert merge_task_vectors(same, "ties", density=0.75, merge_func="sum", **ALL)["a"].tolist() == [16.0, -12.0]
    assert merge_task_vectors(same, "ties", density=0.75, merge_func="mean", **ALL)["a"].tolist() == [8.0, -6.0]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("weights", [[1.0, 0.5, 2.0], [1.0, -0.5, 2.0]])
def test_weighted_votes_match_the_reference(scope, weights):
    vectors = random_vectors(3)
    merged = merge_task_vectors(
        vectors, "ties", weights, list("abc"), density=0.6, trim_scope=scope, weighted_vote=True, **ALL
    )
    assert_near(merged, reference.ties(as_numpy(vectors), weights, 0.6, scope, weighted_vote=True), 1e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0]])
def test_many_draws_take_a_negative_majority(weights, monkeypatch):
    # Two opposite tasks and a common negative rest: every other entry is a draw, in every chunk.
    monkeypatch.setattr(chunks, "CHUNK", 64)
    rows = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    rows[1, ::2] = -rows[0, ::2]
    rows[:, 1::2] = -rows[:, 1::2].abs()
    vectors = tensors(*rows.tolist())
    for vote in ("total", "frequency"):
        for func in ("mean", "sum", "max"):
            options = {"majority_sign_method": vote, "merge_func": func, "density": 1.0}
            merged = merge_task_vectors(vectors, "ties", weights, ["a", "b"], trim_scope="tensor", **options)
            expected = reference.ties(as_numpy(vectors), weights, 1.0, "tensor", vote, func)
            assert_near(merged, expected, 1e-6)
            assert_same(merged, merge_task_vectors(vectors, "ties", weights, ["a", "b"], **options))
    assert np.all(expected["w"][::2] <= 0) or weights[1] < 0


def test_tensors_do_not_need_each_other_once_the_context_is_known(monkeypatch):
    # bfloat16 differences tie massively, so that the places of equal entries run across tensors and chunks.
    monkeypatch.setattr(chunks, "CHUNK", 256)
    vectors = random_vectors(3, {"c": (40, 30), "a": (700,), "b": (20, 5, 3), "small": (7,)}, dtype=torch.bfloat16)
    rule, names, weights = get_merge_method("ties"), ["x", "y", "z"], [1.0, 2.0, 1.0]
    kwargs = {"density": 0.3}
    whole = rule.function(vectors, weights, names, **kwargs)
    context = rule.find_context(vectors, weights, names, kwargs)
    for key in ("c", "small", "a", "b"):
        alone = rule.function([{key: vector[key]} for vector in vectors], weights, names, **kwargs, **context)
        assert_same(alone, {key: whole[key]})
    assert rule.find_context(vectors, weights, names, {"trim_scope": "tensor"}) == {}


def test_a_near_draw_is_decided_exactly():
    # In float32, 1e8 + 1 - 1e8 is 0, and the order of the tasks would decide.
    merged = merge_task_vectors(tensors([1e8], [-1.0], [-1e8]), "ties", density=1.0, **ALL)
    assert merged["w"].item() == pytest.approx(-(1e8 + 1) / 2)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("func", ["mean", "sum", "max"])
def test_results_are_the_float64_ones_rounded_once(scope, func):
    vectors, weights = random_vectors(4, {"w": (30, 40), "v": (50,)}), [0.3, 0.1, 0.7, 0.2]
    merged = merge_task_vectors(vectors, "ties", weights, list("abcd"), trim_scope=scope, merge_func=func, **ALL)
    for key, expected in reference.ties(as_numpy(vectors), weights, 0.2, scope, func=func).items():
        assert np.array_equal(merged[key].numpy(), expected.astype(np.float32)), key
