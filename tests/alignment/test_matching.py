"""Planted orders are found again, maps compose, and nothing but the models decides the result."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers as tf

from hf_atm import merge_state_dicts
from hf_atm.alignment import (
    Alignment,
    Flat,
    Permutation,
    align,
    mlp_spec,
    resnet_spec,
    spec_for,
)
from hf_atm.alignment.assignment import best_permutation
from hf_atm.alignment.mixture import Mixture
from hf_atm.alignment.problem import build_problem
from hf_atm.alignment.workers import workers

from .networks import ResNet, mlp, one_group, planted, shaken


SIZES = (6, 10, 8, 4)


def networks(count, seed=0):
    torch.manual_seed(seed)
    return [mlp(*SIZES).double() for _ in range(count)]


def states_of(models):
    return [dict(model.state_dict()) for model in models]


def same(first, second):
    return all(np.array_equal(first.vectors[name], second.vectors[name]) for name in first.vectors)


def test_a_flat_group_equals_trying_everything():
    scores = np.random.default_rng(2).normal(size=(6, 6))
    vectors, value = best_permutation("P", Flat(6), {"P": scores})
    assert value == pytest.approx(
        max(scores[range(6), list(order)].sum() for order in itertools.permutations(range(6)))
    )
    assert sorted(vectors["P"]) == list(range(6))


_BODY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}

# Wide enough that the planted order is the best one in spite of the noise.
CASES = {
    "mlp": (lambda: mlp(20, 48, 32, 10), mlp_spec),
    "resnet": (lambda: ResNet(one_group, width=8, blocks=1), resnet_spec),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**_BODY, image_size=8, patch_size=4)), spec_for),
    "llama": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_BODY, num_key_value_heads=2, vocab_size=40)),
        spec_for,
    ),
    "bert masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**_BODY, vocab_size=40)), spec_for),
}


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("case", CASES)
def test_planted_orders_are_recovered(case, count):
    torch.manual_seed(0)
    build, spec_of = CASES[case]
    model = shaken(build())
    spec = spec_of(model)
    orders, states = planted(model, spec, count, noise=0.7)
    found = align(states, spec, heads=[])
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


def test_mixtures_round_to_their_largest_part():
    models = networks(2)
    spec = mlp_spec(models[0])
    problem = build_problem(spec, states_of(models), list(models[0].state_dict()), None)
    orders = [Permutation.random(spec, seed) for seed in range(2)]
    point = Mixture(problem, [(0.7, [orders[0].vectors] * 2), (0.3, [orders[1].vectors] * 2)])
    with workers() as pool:
        rounded = point.rounded(pool)
    assert all(np.array_equal(rounded[0][name], orders[0].vectors[name]) for name in rounded[0])
