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

from .networks import TRANSFORMERS, ResNet, mlp, one_group, planted, shaken


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
    assert [run["start"] for run in found.report["starts"]] == ["identity"]


def test_runs_from_the_mean_of_others_follow_where_these_differ():
    torch.manual_seed(0)
    models = [mlp(20, 40, 30, 5) for _ in range(3)]
    found = align(models, mlp_spec(models[0]))
    reached = [(run["start"], run["objective"]) for run in found.report["starts"]]
    assert [start for start, _ in reached] == ["identity", "barycentre", "barycentre", "gauge", "mean", "mean"]
    assert found.objective == pytest.approx(max(value for _, value in reached), rel=1e-6)
    _, states = planted(models[0], mlp_spec(models[0]), 3, noise=0.0)
    again = align(states, mlp_spec(models[0]), starts=("barycentre", "gauge"))
    assert [run["start"] for run in again.report["starts"]] == ["barycentre", "gauge"]


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


def test_task_vectors_and_moments_follow_their_model():
    models = networks(2)
    found = align(models, mlp_spec(models[0]))
    delta = {name: torch.randn_like(tensor) for name, tensor in models[1].state_dict().items()}
    moved = {name: tensor + delta[name] for name, tensor in models[1].state_dict().items()}
    whole, part = found.to_universe(1, moved), found.to_universe(1, delta)
    assert all(torch.equal(whole[name], tensor + part[name]) for name, tensor in found.state_dicts[1].items())
    assert all(torch.equal(found.from_universe(1, part)[name], tensor) for name, tensor in delta.items())


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("vit", "vit.layers.1.attention.v_proj"),
        ("vit", "vit.layers.0.mlp.fc2"),
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("llama", "model.layers.0.self_attn.q_proj"),
        ("llama", "model.layers.0.self_attn.o_proj"),
    ],
)
def test_lora_factors_follow_the_weights_they_belong_to(name, weight):
    torch.manual_seed(0)
    model, _ = TRANSFORMERS[name]()
    order = Permutation.random(spec_for(model))
    full = model.state_dict()[f"{weight}.weight"]
    outputs, inputs = full.shape[::-1] if name == "gpt2" else full.shape
    a, b = torch.randn(3, inputs), torch.randn(outputs, 3)
    update = (b @ a).T if name == "gpt2" else b @ a
    factors = {f"base_model.model.{weight}.lora_A.default.weight": a, f"base_model.model.{weight}.lora_B.weight": b}
    moved_a, moved_b = order.apply(factors).values()
    expected = order.apply({f"{weight}.weight": update})[f"{weight}.weight"]
    torch.testing.assert_close((moved_b @ moved_a).T if name == "gpt2" else moved_b @ moved_a, expected)
    assert not torch.equal(expected, update)


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "tasks, roberta, mean"])
def test_aligned_transformers_compute_the_same(name):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(shaken(TRANSFORMERS[name]()[0], seed))
    inputs = TRANSFORMERS[name]()[1]
    with torch.no_grad():
        before = [model(**inputs).logits for model in models]
        found = align(models, max_iter=10)
        assert not found.map(0, 1).is_identity
        for model, state, logits in zip(models, found.state_dicts, before, strict=True):
            model.load_state_dict(state)
            assert (model(**inputs).logits - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_heads_of_different_tasks_are_mapped_but_not_matched():
    models = [TRANSFORMERS["vit"]()[0] for _ in range(2)]
    models[1].classifier = torch.nn.Linear(24, 7)
    found = align(models, max_iter=10)
    again = align([model.vit.state_dict() for model in models], spec_for(models[0].vit), max_iter=10)
    assert found.objective == pytest.approx(again.objective, rel=1e-6)
    order = found.permutations[1].inverse().vectors["R"]
    assert torch.equal(found.state_dicts[1]["classifier.weight"], models[1].classifier.weight[:, order])
    with pytest.raises(ValueError, match="'classifier.weight' has shapes"):
        align(models, heads=[])


def test_ties_stay_ties_and_types_stay_types():
    models = [TRANSFORMERS["bert masked"]()[0].bfloat16() for _ in range(2)]
    state = align(models, max_iter=5).state_dicts[1]
    assert state["cls.predictions.decoder.weight"] is state["bert.embeddings.word_embeddings.weight"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values() if tensor.is_floating_point())


def test_an_alignment_is_saved_and_loaded(tmp_path):
    models = networks(3)
    found = align(models, mlp_spec(models[0]), keep_soft_maps=True)
    written = set()
    for _ in range(9):
        found.save(tmp_path / "alignment.safetensors")
        written.add((tmp_path / "alignment.safetensors").read_bytes())
    assert len(written) == 1
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
