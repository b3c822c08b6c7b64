from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import merge_task_vectors
from hf_atm.merging.masks import kept_count, kth_magnitude, random_mask, top_mask

from . import reference
from .testing_utils import as_numpy, assert_near, assert_same, random_vectors


ALL = {"min_sparse_numel": 0}


def tensors(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_magnitude_equals_sorting(dtype):
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (1, 50, 200)]
    pieces.append(torch.tensor([0.5, -0.5, 0.5, 0.0, -0.0, 1e-30], dtype=dtype))
    ranked = torch.cat(pieces).abs().sort(descending=True).values
    for k in (1, 2, 77, 100, 200, 253, 257):
        value, ties = kth_magnitude(lambda: iter(pieces), k, dtype)
        assert value == ranked[k - 1].item()
        assert ties == k - int((ranked > ranked[k - 1]).sum())
    with pytest.raises(ValueError, match="258"):
        kth_magnitude(lambda: iter(pieces), 258, dtype)


def test_top_mask_is_exact_and_prefers_low_indices():
    tensor = torch.tensor([[1.0, -1.0, 1.0], [2.0, 1.0, 0.0]])
    assert top_mask(tensor, 3).tolist() == [[True, True, False], [True, False, False]]
    assert top_mask(tensor, 1).tolist() == [[False, False, False], [True, False, False]]


def test_top_mask_of_a_large_tensor():
    # Rounded values make thousands of equal magnitudes; beyond 65536 entries histograms replace sorting.
    tensor = torch.randn(300, 230, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    expected = reference.keep_largest(tensor.double().numpy().reshape(-1), 14000)
    assert np.array_equal(top_mask(tensor, 14000).numpy().reshape(-1), expected)


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


def test_weight_zero_means_absent():
    vectors = random_vectors(3)
    for method, kwargs in (("ties", {"density": 0.5}), ("tsv_m", {}), ("dare_ties", {"density": 0.5})):
        with_zero = merge_task_vectors(vectors, method, [1, 1, 0], ["a", "b", "c"], **kwargs)
        assert_same(with_zero, merge_task_vectors(vectors[:2], method, [1, 1], ["a", "b"], **kwargs))


@pytest.mark.parametrize(("rescale", "factor"), [(True, 4.0), (False, 1.0)])
def test_dare_golden_from_its_own_mask(rescale, factor):
    tau = torch.arange(1.0, 201.0)
    merged = merge_task_vectors([{"w": tau}], "dare", names=["a"], density=0.25, seed=3, rescale=rescale)
    mask = random_mask(tau.shape, 0.25, 3, "w", "a")
    assert 20 < int(mask.sum()) < 80
    assert torch.equal(merged["w"], torch.where(mask, tau * factor, torch.zeros_like(tau)))


def test_dare_is_unbiased_over_seeds():
    vectors = random_vectors(2, {"w": (20, 10)})
    draws = [merge_task_vectors(vectors, "dare", names=["a", "b"], density=0.5, seed=seed)["w"] for seed in range(400)]
    draws = torch.stack(draws).double()
    error = draws.mean(0) - merge_task_vectors(vectors, names=["a", "b"])["w"]
    deviation = draws.std(0) / 400**0.5
    # 200 entries: the largest of that many normal scores is below 4.5 but for one seed choice in a thousand.
    assert float((error.abs() / deviation.clamp(min=1e-12)).max()) < 4.5
    assert float(draws.std(0).mean()) > 0.1


def test_dare_mask_depends_on_seed_key_and_task_only():
    shape = torch.Size([500])
    mask = random_mask(shape, 0.5, 0, "w", "a")
    torch.manual_seed(123)
    assert torch.equal(mask, random_mask(shape, 0.5, 0, "w", "a"))
    for other in ((1, "w", "a"), (0, "v", "a"), (0, "w", "b")):
        share = float((mask == random_mask(shape, 0.5, *other)).float().mean())
        assert 0.4 < share < 0.6
    # Fixed for all time: a change would silently alter every recorded run.
    bits = random_mask(torch.Size([16]), 0.5, 0, "layer.weight", "task").int().tolist()
    assert "".join(map(str, bits)) == "1011011110010000"


def test_dare_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    merge_task_vectors(random_vectors(2), "dare", density=0.5, **ALL)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dare_at_density_one_is_linear(dtype):
    vectors, weights = random_vectors(3, dtype=dtype), [0.3, 0.1, 0.7]
    assert_same(
        merge_task_vectors(vectors, "dare", weights, density=1.0, **ALL),
        merge_task_vectors(vectors, "linear", weights),
    )
    assert_same(
        merge_task_vectors(vectors, "dare", weights, density=1.0, normalize=False),
        merge_task_vectors(vectors, "task_arithmetic", weights),
    )


def test_dare_ties_at_density_one_is_untrimmed_ties():
    vectors = random_vectors(3)
    left = merge_task_vectors(vectors, "dare_ties", density=1.0, **ALL)
    assert_same(left, merge_task_vectors(vectors, "ties", density=1.0, trim_scope="tensor", **ALL))


def test_dare_ties_merges_the_masked_values():
    vectors, names = random_vectors(3, {"w": (40, 5)}), ["a", "b", "c"]
    masked = [
        {"w": torch.where(random_mask(v["w"].shape, 0.5, 7, "w", n), v["w"] * 2, torch.zeros(()))}
        for v, n in zip(vectors, names, strict=True)
    ]
    merged = merge_task_vectors(vectors, "dare_ties", names=names, density=0.5, seed=7)
    assert_near(merged, reference.ties(as_numpy(masked), [1, 1, 1], 1.0, "tensor"), 1e-6)


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


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "breadcrumbs"])
def test_small_tensors_take_the_mean(method):
    vectors = random_vectors(2, {"one": (1,), "scalar": (), "n99": (99,), "n100": (100,), "none": (0, 3)})
    merged = merge_task_vectors(vectors, method, [3, 1], ["a", "b"], density=0.1)
    mean = merge_task_vectors(vectors, "mean", [3, 1], ["a", "b"])
    for key in ("one", "scalar", "n99", "none"):
        assert torch.equal(merged[key], mean[key]), key
    assert not torch.equal(merged["n100"], mean["n100"])


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_at_least_one_entry_survives(method):
    for scope in ({"trim_scope": "tensor"}, {"trim_scope": "model"}) if method == "ties" else ({"gamma": 0.0},):
        vectors = [{"a": torch.tensor([2.0, -3.0, 1.0]), "b": torch.tensor([1.0])}]
        merged = merge_task_vectors(vectors, method, density=0.01, **scope, **ALL)
        assert merged["a"].tolist() == [0.0, -3.0, 0.0]
    for gamma in (0.9, 1 - 1e-14):
        one = merge_task_vectors([{"a": torch.tensor([2.0])}], "breadcrumbs", density=1e-14, gamma=gamma, **ALL)
        assert one["a"].tolist() == [2.0]


def test_counts_survive_float_products():
    assert int(0.29 * 100) == 28
    assert kept_count(0.29, 100) == 29 and kept_count(0.2, 7) == 1 and kept_count(1.0, 7) == 7


def test_all_zero_vectors_stay_zero():
    for method in ("ties", "dare", "dare_ties", "breadcrumbs"):
        merged = merge_task_vectors([{"w": torch.zeros(150)}] * 2, method, density=0.2)
        assert np.array_equal(merged["w"].numpy(), np.zeros(150))
