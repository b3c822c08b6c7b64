"""Non-linear methods on small matrices: core space, KnOTS and full space against dense references."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_atm.merging import merge_adapters, merge_task_vectors, register_merge_method, registry
from hf_atm.merging.adapters.factors import LowRank
from hf_atm.merging.adapters.spaces import core_space, knots_space
from tests.merging import reference

from . import reference_adapters
from .testing_utils import adapted, assert_updates, base_model, pair, toy_adapters, true_update


METHODS = {
    "mean": {},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare": {"density": 0.5, "seed": 1},
    "dare_ties": {"density": 0.5, "seed": 1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "tsv_m": {},
    "iso_c": {},
}
NAMES = ["a", "b", "c"]
WEIGHTS = [1.0, 0.5, 2.0]


def random_updates(ranks, m=20, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(m, rank), draw(rank, n)) for rank in ranks]


def by_module(base, models):
    """Dense updates as NumPy: modules outside, tasks inside."""
    updates = [true_update(base, model) for model in models]
    return {name: [update[name].numpy() for update in updates] for name in ("first.weight", "second.weight")}


def as_updates(names, matrices):
    return {name: torch.as_tensor(matrix) for name, matrix in zip(names, matrices, strict=True)}


def ties_rule(density):
    """TIES over all modules at once, by the reference for dictionaries."""

    def rule(cores, weights):
        vectors = [{str(m): module[t] for m, module in enumerate(cores)} for t in range(len(weights))]
        merged = reference.ties(vectors, weights, density)
        return [merged[str(m)] for m in range(len(cores))]

    return rule


def test_core_space_loses_nothing_and_is_small():
    updates = random_updates([2, 1, 3])
    space = core_space(updates)
    for basis in (space.left, space.right):
        assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-12)
    for update, core in zip(updates, space.parts, strict=True):
        assert core.shape == (6, 6)
        assert torch.allclose(space.lift(core).dense(), update.dense(), atol=1e-10)
        assert space.lift(core).rank == update.rank
    left, right = reference_adapters.bases([update.dense().numpy() for update in updates])
    assert np.abs(space.left.numpy() - left).max() <= 1e-9
    assert np.abs(space.right.numpy() - right).max() <= 1e-9


def test_core_space_of_more_ranks_than_dimensions():
    updates = random_updates([5, 5, 5], m=6, n=12)
    space = core_space(updates)
    assert space.parts[0].shape == (6, 12)
    assert torch.allclose(space.lift(space.parts[1]).dense(), updates[1].dense(), atol=1e-10)


def test_shared_directions_are_counted_once():
    first, second = random_updates([3, 3])
    shared = [first, LowRank(second.left, first.right)]
    space = core_space(shared)
    assert space.parts[0].shape == (6, 3)
    padded = core_space(shared, pad=True)
    assert padded.parts[0].shape == (6, 6)
    assert torch.equal(padded.parts[0][:, :3], space.parts[0])
    assert not padded.parts[0][:, 3:].any()


def test_knots_parts_are_the_right_singular_vectors():
    updates = random_updates([2, 3])
    space = knots_space(updates)
    dense = np.hstack([update.dense().numpy() for update in updates])
    values = np.linalg.svd(dense, compute_uv=False)[:5]
    stacked = torch.cat(space.parts, dim=1)
    assert torch.allclose(stacked @ stacked.T, torch.eye(5, dtype=torch.float64), atol=1e-10)
    assert np.abs(space.lifting.norm(dim=0).numpy() - values).max() <= 1e-9
    for update, part in zip(updates, space.parts, strict=True):
        assert torch.allclose(space.lift(part).dense(), update.dense(), atol=1e-10)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_spectral_methods_in_core_space_equal_the_dense_ones(method, shared):
    base = base_model("toy")
    models = [adapted(base, seed, ["first", "second"], r=rank) for seed, rank in ((1, 1), (2, 3), (3, 2))]
    if shared:
        models = toy_adapters(3, base)
        with torch.no_grad():
            for name in ("first", "second"):
                for model in models[1:]:
                    other = getattr(models[0].base_model.model, name).lora_A["default"].weight
                    getattr(model.base_model.model, name).lora_A["default"].weight.copy_(other)
    updates = by_module(base, models)
    expected = {}
    for name, tasks in updates.items():
        if method == "tsv_m":
            expected[name] = reference.tsv_m(tasks, WEIGHTS)
        else:
            total = sum(w * task for w, task in zip(WEIGHTS, tasks, strict=True))
            expected[name] = reference.iso_c(tasks, WEIGHTS, np.linalg.matrix_rank(total))
    expected = {name: torch.as_tensor(value) for name, value in expected.items()}
    adapters = [pair(model) for model in models]
    for space in ("core", "full"):
        merged = merge_adapters(adapters, method, WEIGHTS, output="delta", space=space)
        assert_updates(dict(merged.deltas), expected)


def test_ties_in_core_space_sees_the_cores_of_all_modules():
    base = base_model("toy")
    models = toy_adapters(3, base)
    updates = by_module(base, models)
    expected = reference_adapters.in_core_space(list(updates.values()), WEIGHTS, ties_rule(0.3))
    merged = merge_adapters([pair(model) for model in models], "ties", WEIGHTS, "delta", names=NAMES, density=0.3)
    assert_updates(dict(merged.deltas), as_updates(updates, expected))


def test_ties_in_knots_space_sees_the_aligned_right_singular_vectors():
    base = base_model("toy")
    models = toy_adapters(3, base)
    updates = by_module(base, models)
    expected = reference_adapters.in_knots_space(list(updates.values()), WEIGHTS, ties_rule(0.3))
    merged = merge_adapters(
        [pair(model) for model in models], "ties", WEIGHTS, "delta", names=NAMES, density=0.3, space="knots"
    )
    assert_updates(dict(merged.deltas), as_updates(updates, expected))


@pytest.mark.parametrize("method", METHODS)
def test_full_space_is_the_method_on_dense_updates(method):
    base = base_model("gpt2")
    models = [adapted(base, seed, ["c_attn", "c_proj", "wpe"]) for seed in (1, 2, 3)]
    vectors = [{key: value.float() for key, value in true_update(base, model).items()} for model in models]
    expected = merge_task_vectors(vectors, method, WEIGHTS, NAMES, **METHODS[method])
    merged = merge_adapters(
        [pair(model) for model in models],
        method,
        WEIGHTS,
        output="delta",
        space="full",
        names=NAMES,
        **METHODS[method],
    )
    assert_updates(dict(merged.deltas), expected)


@pytest.mark.parametrize("method", ["wudi", "swudi", "model_stock", "karcher"])
def test_norms_angles_and_least_squares_are_the_same_in_core_space(method):
    adapters = [pair(model) for model in toy_adapters(3)]
    results = [merge_adapters(adapters, method, output="delta", space=space).deltas for space in ("core", "full")]
    assert_updates(dict(results[0]), {name: tensor.double() for name, tensor in results[1].items()}, 1e-5)


def test_square_transposed_matrices_keep_their_input_side():
    base = base_model("gpt2")
    models = [adapted(base, seed, ["c_attn", "c_proj"]) for seed in (1, 2, 3)]
    adapters = [pair(model) for model in models]
    core, full = (merge_adapters(adapters, "wudi", output="delta", space=space).deltas for space in ("core", "full"))
    assert_updates(dict(core), {name: tensor.double() for name, tensor in full.items()}, 1e-5)


def test_keywords_refer_to_the_order_given():
    base = base_model("toy")
    models = toy_adapters(2, base)
    coefficients = {"first.weight": [1.0, 2.0], "second.weight": [3.0, 4.0]}
    merged = merge_adapters(
        [pair(model) for model in models], "adamerging", names=["z", "a"], output="delta", coefficients=coefficients
    )
    updates = [true_update(base, model) for model in models]
    expected = {
        name: sum(c * update[name] for c, update in zip(row, updates, strict=True))
        for name, row in coefficients.items()
    }
    assert_updates(dict(merged.deltas), expected)


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("regmean", {"statistics": [{}, {}]}, "statistics of 'regmean' are of whole weights.*space='full'"),
        ("tsv_m", {"fuse_qkv": True}, "fuse_qkv=True cuts whole weights.*space='full'"),
    ],
)
def test_what_only_whole_weights_have(method, kwargs, message):
    adapters = [pair(model) for model in toy_adapters(2)]
    with pytest.raises(ValueError, match=message):
        merge_adapters(adapters, method, **kwargs)


def regauged(model, seed):
    """The same updates, split into other factors: A -> G A, B -> B G^-1."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.base_model.model.first, model.base_model.model.second):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            gauge = torch.randn(a.shape[0], a.shape[0], generator=generator, dtype=torch.float64)
            a.copy_(gauge @ a)
            b.copy_(b @ torch.linalg.inv(gauge))
    return model


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", METHODS)
def test_how_an_update_is_split_into_factors_does_not_matter(method, space):
    if space == "knots" and registry.get_merge_method(method).family != "elementwise":
        return
    models = [model.double() for model in toy_adapters(3)]
    others = [regauged(model, seed) for seed, model in enumerate(models)]
    results = [
        merge_adapters(
            [pair(model) for model in given],
            method,
            WEIGHTS,
            output="delta",
            names=NAMES,
            space=space,
            **METHODS[method],
        )
        for given in (models, others)
    ]
    for name in results[0].deltas:
        assert (results[0].deltas[name] - results[1].deltas[name]).abs().max() <= 1e-9
        assert results[0].deltas[name].abs().max() > 1e-2


@pytest.mark.parametrize("space", ["core", "full", "knots"])
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_adapters_changes_no_bit(method, space):
    if space == "knots" and registry.get_merge_method(method).family != "elementwise":
        return
    adapters = [pair(model) for model in toy_adapters(3)]
    for names in (NAMES, None):
        results = []
        for order in ([0, 1, 2], [2, 0, 1]):
            given = None if names is None else [names[index] for index in order]
            weights = [WEIGHTS[index] for index in order]
            chosen = [adapters[index] for index in order]
            results.append(merge_adapters(chosen, method, weights, names=given, space=space, **METHODS[method]))
        assert results[0].factors.keys() == results[1].factors.keys()
        for key, tensor in results[0].factors.items():
            assert torch.equal(tensor, results[1].factors[key]), key


def test_a_spectrum_cannot_be_spread_beyond_the_updates():
    base = base_model("toy")
    models = toy_adapters(2, base)
    with torch.no_grad():
        for name in ("first", "second"):
            other = getattr(models[0].base_model.model, name).lora_A["default"].weight
            getattr(models[1].base_model.model, name).lora_A["default"].weight.copy_(other)
    adapters = [pair(model) for model in models]
    with pytest.raises(ValueError, match="outside the span.*space='full'"):
        merge_adapters(adapters, "iso_c", rank_rule="full")
    merge_adapters(adapters, "iso_c", rank_rule="full", space="full")


def test_a_user_method_of_the_linear_family_stays_exact(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @register_merge_method("alternating", family="linear")
    def alternating(task_vectors, weights, names):
        return {
            key: sum((-1) ** index * vector[key] for index, vector in enumerate(task_vectors))
            for key in task_vectors[0]
        }

    base = base_model("toy")
    models = toy_adapters(2, base)
    merged = merge_adapters([pair(model) for model in models], "alternating", names=["a", "b"], output="delta")
    first, second = (true_update(base, model) for model in models)
    assert_updates(dict(merged.deltas), {name: first[name] - second[name] for name in first})
    assert merge_adapters([pair(model) for model in models], "alternating").report["modules"]["first"]["rank"] == 4
