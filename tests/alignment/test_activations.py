"""Matching by what units respond with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hf_atm.alignment import Permutation, align, mlp_spec, resnet_spec, spec_for, vgg_spec
from hf_atm.alignment.features import _collect

from .networks import TRANSFORMERS, ResNet, mlp, planted, shaken, vgg


PLAIN = {
    "mlp": (lambda: mlp(12, 32, 32, 5), mlp_spec, (64, 12)),
    "vgg": (vgg, vgg_spec, (64, 3, 16, 16)),
    "resnet": (lambda: ResNet(width=8, blocks=1), resnet_spec, (64, 3, 16, 16)),
}


def network(name):
    torch.manual_seed(0)
    return shaken(PLAIN[name][0]() if name in PLAIN else TRANSFORMERS[name]()[0])


def loader(name):
    generator = torch.Generator().manual_seed(4)
    if name in PLAIN:
        return [torch.randn(PLAIN[name][2], generator=generator) for _ in range(4)]
    if name == "vit":
        return [{"pixel_values": torch.randn(64, 3, 16, 16, generator=generator)}]
    batch = {"input_ids": torch.randint(3, 30, (40, 7), generator=generator)}
    batch["attention_mask"] = torch.ones(40, 7, dtype=torch.long)
    batch["attention_mask"][::3, 5:] = 0
    return [{**batch, "task": "b"}] if name.startswith("tasks") else [batch]


@pytest.mark.parametrize(
    ("name", "noise"),
    [("mlp", 0.2), *((name, 0.0) for name in (*PLAIN, "vit", "gpt2", "llama", "bert", "tasks, bert"))],
)
def test_planted_orders_are_recovered_from_activations(name, noise):
    spec = PLAIN[name][1](network(name)) if name in PLAIN else spec_for(network(name))
    orders, states = planted(network(name), spec, 3, noise)
    models = []
    for state in states:
        models.append(network(name))
        models[-1].load_state_dict(state)
    found = align(models, spec, "activations", loader(name))
    for target in (1, 2):
        wanted = orders[target].compose(orders[0].inverse()).vectors
        for variable, vector in found.map(0, target).vectors.items():
            assert np.array_equal(vector, wanted[variable]), variable


def test_given_features_are_matched():
    torch.manual_seed(0)
    base = {"P.0": torch.randn(200, 32), "P.1": torch.randn(200, 32)}
    spec = mlp_spec(network("mlp"))
    orders = [Permutation.random(spec, seed) for seed in range(3)]
    features = [
        # Scale and offset of a unit do not count.
        {name: 5 * x[:, order.vectors[name]] + torch.rand(32) + 0.5 * torch.randn(200, 32) for name, x in base.items()}
        for order in orders
    ]
    found = align([network("mlp") for _ in range(3)], spec, "activations", features)
    for target in (1, 2):
        wanted = orders[target].compose(orders[0].inverse()).vectors
        assert all(np.array_equal(vector, wanted[name]) for name, vector in found.map(0, target).vectors.items())


def test_features_of_heads_are_given_by_view():
    spec = spec_for(network("llama"))
    orders = [Permutation.random(spec, seed) for seed in range(2)]
    torch.manual_seed(0)
    base = {}
    for layer in range(2):
        base |= {f"A.{layer}:q": torch.randn(50, 24), f"A.{layer}:v": torch.randn(50, 12)}
        base |= {f"M.{layer}": torch.randn(50, 40)}
    base["R"] = torch.randn(50, 24)
    features = [{axis: x[:, torch.from_numpy(_indices(order, axis))] for axis, x in base.items()} for order in orders]
    found = align([network("llama") for _ in range(2)], spec, "activations", features)
    wanted = orders[1].compose(orders[0].inverse()).vectors
    assert all(np.array_equal(vector, wanted[name]) for name, vector in found.map(0, 1).vectors.items())


def _indices(order, axis):
    view = order.spec.views(axis)[0]
    return view.indices(order.vectors[view.variable])


def test_norms_stand_for_their_groups_and_padding_is_dropped():
    model = network("bert")
    batch = loader("bert")[0]
    layers, (state,) = _collect([model], spec_for(model).restricted(list(model.state_dict())), [batch])
    assert layers["bert.embeddings.LayerNorm"] == "R"
    assert layers["bert.encoder.layer.0.attention.self.query"] == "A.0:q"
    assert "bert.encoder.layer.0.output.dense" not in layers
    assert state["bert.encoder.layer.0.intermediate.dense"].shape == (int(batch["attention_mask"].sum()), 40)
    assert not any(isinstance(model.get_submodule(layer), nn.Embedding) for layer in layers)
