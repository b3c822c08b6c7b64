"""Objective, gradients, line search and oracle against plain references; planted orders found again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_atm import merge_state_dicts
from hf_atm.alignment import (
    Alignment,
    Flat,
    Heads,
    Permutation,
    PermutationSpec,
    align,
    mlp_spec,
    resnet_spec,
    spec_for,
)
from hf_atm.alignment.assignment import best_permutation
from hf_atm.alignment.frank_wolfe import best_step, gradients, quartic, value_of
from hf_atm.alignment.mixture import Mixture
from hf_atm.alignment.problem import build_problem, objective
from hf_atm.alignment.starts import starting_point
from hf_atm.alignment.workers import workers

from .networks import ResNet, mlp, one_group, shaken


SIZES = (6, 10, 8, 4)


def networks(count, seed=0):
    torch.manual_seed(seed)
    return [mlp(*SIZES).double() for _ in range(count)]


def states_of(models):
    return [dict(model.state_dict()) for model in models]


def matrix(vector):
    """P with P[i, c_i] = 1."""
    return np.eye(len(vector))[vector]


def pairwise(states, matrices):
    """The sum over pairs of models and tensors of inner products in the universe, written out for the MLP."""
    seen = []
    for state, (first, second) in zip(states, matrices, strict=True):
        w = [state[f"{layer}.weight"].numpy() for layer in (0, 2, 4)]
        b = [state[f"{layer}.bias"].numpy() for layer in (0, 2)]
        seen.append([first.T @ w[0], second.T @ w[1] @ first, w[2] @ second, first.T @ b[0], second.T @ b[1]])
    # The last bias has no order, and so no part in the objective.
    return sum((x * y).sum() for p, q in itertools.combinations(seen, 2) for x, y in zip(p, q, strict=True))


def planted(model, spec, count, noise, seed=0):
    """Copies of one network in random orders, each entry disturbed by a share of its tensor's deviation."""
    generator = torch.Generator().manual_seed(seed)
    orders = [Permutation.random(spec, seed + index) for index in range(count)]
    states = []
    for order in orders:
        state = order.apply(dict(model.state_dict()))
        for value in state.values():
            if value.is_floating_point() and value.numel() > 1:
                scale = noise * value.std()
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * scale)
        states.append(state)
    return orders, states


def same(first, second):
    return all(np.array_equal(first.vectors[name], second.vectors[name]) for name in first.vectors)


def test_the_objective_is_the_sum_over_pairs():
    models = networks(4)
    spec = mlp_spec(models[0])
    names = [name for name in models[0].state_dict()]
    problem = build_problem(spec, states_of(models), names, None)
    orders = [Permutation.random(spec, index) for index in range(4)]
    value = objective(problem, [order.vectors for order in orders])
    expected = pairwise(states_of(models), [(matrix(o.vectors["P.0"]), matrix(o.vectors["P.1"])) for o in orders])
    assert value == pytest.approx(expected, rel=1e-9)


def test_gradients_are_finite_differences_at_soft_maps():
    models = networks(3)
    spec = mlp_spec(models[0])
    problem = build_problem(spec, states_of(models), list(models[0].state_dict()), None)
    point = starting_point(problem, "barycentre", 0, 0)
    with workers() as pool:
        scores, _ = gradients(point, pool)
    dense = [[point.dense(name, model) for name in ("P.0", "P.1")] for model in range(3)]
    value = pairwise(states_of(models), dense)
    assert value_of(point) == pytest.approx(value, rel=1e-9)
    rng = np.random.default_rng(0)
    for model, which in itertools.product(range(3), range(2)):
        direction = rng.normal(size=dense[model][which].shape)
        ends = []
        for step in (1e-4, -1e-4):
            moved = [[part.copy() for part in parts] for parts in dense]
            moved[model][which] += step * direction
            ends.append(pairwise(states_of(models), moved))
        slope = (ends[0] - ends[1]) / 2e-4
        assert (scores[model][f"P.{which}"] * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_the_line_is_exact_and_its_maximum_the_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.normal(size=(3, 5))
        coefficients = quartic(rows @ rows.T - 2 * np.eye(3))
        steps = np.linspace(0, 1, 2001)
        phi = np.stack([(1 - steps) ** 2, steps * (1 - steps), steps**2])
        values = np.einsum("is,ij,js->s", phi, rows @ rows.T - 2 * np.eye(3), phi)
        assert np.allclose(np.polynomial.polynomial.polyval(steps, coefficients), values, atol=1e-12)
        step, gain = best_step(coefficients)
        assert gain >= values.max() - values[0] - 1e-9 and 0 <= step <= 1
    assert best_step(np.array([1.0, -1.0, 0, 0, 0])) == (0.0, 0.0)


@pytest.mark.parametrize(("qk_inner", "v_inner"), [(True, True), (False, True), (False, False)])
def test_the_oracle_of_heads_equals_trying_everything(qk_inner, v_inner):
    rng = np.random.default_rng(1)
    group = Heads(3, 2, 3, qk_inner, v_inner)
    scores = {"A:qk": rng.normal(size=(9, 9)), "A:v": rng.normal(size=(9, 9))}
    inner = list(itertools.permutations(range(3)))
    best = -np.inf
    for outer in itertools.permutations(range(3)):
        value = 0.0
        for kind, free in (("A:qk", qk_inner), ("A:v", v_inner)):
            blocks = scores[kind].reshape(3, 3, 3, 3)
            for head, target in enumerate(outer):
                choices = inner if free else [(0, 1, 2)]
                value += max(sum(blocks[head, i, target, order[i]] for i in range(3)) for order in choices)
        best = max(best, value)
    vectors, value = best_permutation("A", group, scores)
    assert value == pytest.approx(best)
    assert sum(scores[name][np.arange(9), vector].sum() for name, vector in vectors.items()) == pytest.approx(best)


def test_a_flat_group_equals_trying_everything():
    scores = np.random.default_rng(2).normal(size=(6, 6))
    vectors, value = best_permutation("P", Flat(6), {"P": scores})
    assert value == pytest.approx(
        max(scores[range(6), list(order)].sum() for order in itertools.permutations(range(6)))
    )
    assert sorted(vectors["P"]) == list(range(6))


CASES = {
    "mlp": (lambda: mlp(20, 48, 32, 10), mlp_spec),
    "resnet": (lambda: ResNet(one_group, width=8, blocks=1), resnet_spec),
    "vit": (
        lambda: ViTModel(
            ViTConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                intermediate_size=48,
                image_size=16,
                patch_size=4,
            ),
            add_pooling_layer=False,
        ),
        spec_for,
    ),
}


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("case", CASES)
def test_planted_orders_are_recovered(case, count):
    torch.manual_seed(0)
    build, spec_of = CASES[case]
    model = shaken(build())
    spec = spec_of(model).restricted(list(model.state_dict()))
    orders, states = planted(model, spec, count, noise=0.7)
    found = align(states, spec)
    for source, target in itertools.product(range(count), repeat=2):
        assert same(found.map(source, target), orders[target].compose(orders[source].inverse()))
    assert found.history[-1] == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("method", ["c2m3", "git-rebasin", "merge-many"])
def test_around_a_cycle_of_models_nothing_moves(method):
    models = networks(4)
    found = align(models, mlp_spec(models[0]), method)
    for a, b, c in itertools.permutations(range(4), 3):
        around = found.map(c, a).compose(found.map(b, c)).compose(found.map(a, b))
        assert around.is_identity
    assert found.map(1, 2).compose(found.map(2, 1)).is_identity


@pytest.mark.parametrize("start", ["identity", "barycentre", "gauge", "anchored"])
def test_the_objective_never_falls(start):
    torch.manual_seed(0)
    models = [mlp(20, 40, 30, 5) for _ in range(3)]
    found = align(models, mlp_spec(models[0]), starts=(start,))
    # Rounding lies between; a gauge run has its first model held fixed, and freed when it has settled.
    cut = found.report["iterations"]
    for part in (found.history[:cut], found.history[cut:]):
        falls = [before - after for before, after in zip(part, part[1:], strict=False)]
        assert max(falls, default=0) <= 1e-6 * abs(found.objective)
    assert len(found.history) >= 2


def test_better_than_the_baselines_on_networks_of_their_own():
    torch.manual_seed(0)
    models = [mlp(20, 40, 30, 5) for _ in range(4)]
    spec = mlp_spec(models[0])
    reached = {method: align(models, spec, method).objective for method in ("c2m3", "git-rebasin", "merge-many")}
    assert reached["c2m3"] > reached["git-rebasin"] and reached["c2m3"] > reached["merge-many"] > 0


def test_the_order_of_the_models_and_threads_change_nothing():
    torch.manual_seed(0)
    models = [mlp(20, 40, 30, 5) for _ in range(4)]
    spec = mlp_spec(models[0])
    first = align(models, spec)
    shuffled = [2, 0, 3, 1]
    second = align([models[index] for index in shuffled], spec)
    torch.set_num_threads(2)
    third = align(models, spec)
    for place, index in enumerate(shuffled):
        for name, value in first.state_dicts[index].items():
            assert torch.equal(value, second.state_dicts[place][name])
            assert torch.equal(value, third.state_dicts[index][name])


def test_models_tuned_from_one_base_stay_where_they_are():
    torch.manual_seed(0)
    base = mlp(20, 48, 32, 10)
    models = [
        {name: value + 0.05 * value.std() * torch.randn(value.shape) for name, value in base.state_dict().items()}
        for _ in range(3)
    ]
    found = align(models, mlp_spec(base))
    assert all(found.map(0, index).is_identity for index in range(3))


def test_functions_survive_and_inputs_are_not_touched():
    models = networks(3)
    before = [{name: value.clone() for name, value in state.items()} for state in states_of(models)]
    found = align(models, mlp_spec(models[0]))
    x = torch.randn(7, 6, dtype=torch.float64)
    for model, state, kept in zip(models, found.state_dicts, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
        moved = mlp(*SIZES).double()
        moved.load_state_dict(state)
        assert torch.allclose(moved(x), model(x), atol=1e-12)
    merged = merge_state_dicts(found.state_dicts)
    back = found.from_universe(1, merged)
    assert all(torch.equal(found.to_universe(1, back)[name], value) for name, value in merged.items())


def test_task_vectors_and_adapters_follow_the_weights():
    torch.manual_seed(0)
    models = [mlp(6, 10, 8, 4) for _ in range(2)]
    found = align(models, mlp_spec(models[0]))
    state = models[1].state_dict()
    a, b = torch.randn(3, 10), torch.randn(8, 3)
    vector = {"2.weight": b @ a}
    adapter = {"2.lora_A.weight": a, "2.lora_B.weight": b}
    moved, factors = found.to_universe(1, vector), found.to_universe(1, adapter)
    assert torch.allclose(factors["2.lora_B.weight"] @ factors["2.lora_A.weight"], moved["2.weight"], atol=1e-6)
    whole = found.to_universe(1, {"2.weight": state["2.weight"] + vector["2.weight"]})
    assert torch.allclose(whole["2.weight"], found.state_dicts[1]["2.weight"] + moved["2.weight"], atol=1e-6)


def test_activations_find_what_was_planted():
    torch.manual_seed(0)
    model = mlp(20, 48, 32, 10)
    spec = mlp_spec(model)
    orders, states = planted(model, spec, 3, noise=0.2)
    models = []
    for state in states:
        copy = mlp(20, 48, 32, 10)
        copy.load_state_dict(state)
        models.append(copy)
    data = [torch.randn(64, 20) for _ in range(4)]
    found = align(models, spec, "activations", data)
    for source, target in itertools.product(range(3), repeat=2):
        assert same(found.map(source, target), orders[target].compose(orders[source].inverse()))


def test_an_alignment_is_saved_and_loaded(tmp_path):
    models = networks(3)
    found = align(models, mlp_spec(models[0]), keep_soft_maps=True)
    found.save(tmp_path / "alignment.safetensors")
    loaded = Alignment.load(tmp_path / "alignment.safetensors")
    assert loaded.objective == found.objective and loaded.spec == found.spec and loaded.method == "c2m3"
    assert all(same(a, b) for a, b in zip(found.permutations, loaded.permutations, strict=True))
    for soft in found.soft_maps:
        for values in soft.values():
            assert np.allclose(values.sum(0), 1) and np.allclose(values.sum(1), 1) and values.min() >= -1e-12
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="Alignment.save wrote"):
        Alignment.load(tmp_path / "other")


def test_bad_input():
    models = networks(2)
    spec = mlp_spec(models[0])
    broken = networks(1)[0]
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    cases = [
        ([models[0]], spec, {}, "two"),
        ([models[0], mlp(6, 11, 8, 4)], spec, {}, "0.weight"),
        ([models[0], broken], spec, {}, "0.weight"),
        (models, PermutationSpec({"P": Flat(10)}, {"0.weight": ("P", None)}), {}, "says nothing about"),
        (models, PermutationSpec(spec.groups, {**spec.axes, "9.weight": ("P.0", None)}), {}, "9.weight"),
        (models, spec, {"method": "best"}, "best"),
        (models, spec, {"starts": ("anywhere",)}, "anywhere"),
        (models, spec, {"method": "activations"}, "data"),
        (models, spec, {"max_iter": 0}, "max_iter=0"),
        ([dict(model.state_dict()) for model in models], None, {}, "pass spec="),
    ]
    for inputs, given, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            align(inputs, given, **options)
        assert "\n" not in str(error.value)


def test_mixtures_round_to_their_largest_part():
    models = networks(2)
    spec = mlp_spec(models[0])
    problem = build_problem(spec, states_of(models), list(models[0].state_dict()), None)
    orders = [Permutation.random(spec, seed) for seed in range(2)]
    point = Mixture(problem, [(0.7, [orders[0].vectors] * 2), (0.3, [orders[1].vectors] * 2)])
    with workers() as pool:
        rounded = point.rounded(pool)
    assert all(np.array_equal(rounded[0][name], orders[0].vectors[name]) for name in rounded[0])
