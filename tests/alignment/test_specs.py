"""Every specification keeps the network's function under any admissible order; one that would not is noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

from hf_atm import MultiTaskModel
from hf_atm.alignment import (
    Flat,
    Heads,
    Permutation,
    PermutationSpec,
    check_permutation_spec,
    mlp_spec,
    register_permutation_spec,
    resnet_spec,
    spec_for,
    vgg_spec,
)

from .networks import TRANSFORMERS, ChannelNorm, ResNet, images, mlp, one_group, pre_resnet, shaken, tokens, vgg


def output(model, inputs):
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return result if isinstance(result, torch.Tensor) else result[0] if "logits" not in result else result.logits


def change(model, spec, inputs, seed=1):
    """Largest change of the output, as a share of its largest entry, under a random order."""
    before = output(model, inputs)
    order = Permutation.random(spec, seed)
    assert not order.is_identity
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moved = order.apply(state)
    assert any(not torch.equal(moved[name], state[name]) for name in state)
    model.load_state_dict(moved)
    after = output(model, inputs)
    model.load_state_dict(order.inverse().apply(moved))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_keep_their_function(name):
    torch.manual_seed(0)
    model, inputs = TRANSFORMERS[name]()
    model = shaken(model)
    spec = spec_for(model)
    assert change(model, spec, inputs) <= 1e-5
    # All groups move something.
    for group in spec.restricted(list(model.state_dict())).groups:
        alone = Permutation.identity(spec)
        full = Permutation.random(spec, 3)
        vectors = {n: full.vectors[n] if n.partition(":")[0] == group else v for n, v in alone.vectors.items()}
        moved = Permutation(spec, vectors).apply(model.state_dict())
        assert any(not torch.equal(moved[n], v) for n, v in model.state_dict().items()), group


@pytest.mark.parametrize(
    ("build", "spec_of", "inputs"),
    [
        (lambda: mlp(7, 12, 9, 4), mlp_spec, lambda: torch.randn(5, 7)),
        (lambda: vgg(), vgg_spec, lambda: images(16)),
        (lambda: vgg(ChannelNorm), vgg_spec, lambda: images(16)),
        (lambda: ResNet(), resnet_spec, lambda: images(16)),
        (lambda: ResNet(one_group, width=8, blocks=1), resnet_spec, lambda: images(16)),
        (pre_resnet, resnet_spec, lambda: images(16)),
    ],
    ids=["mlp", "vgg", "vgg with LayerNorm", "resnet with BatchNorm", "resnet with GroupNorm", "norms before"],
)
def test_plain_networks_keep_their_function(build, spec_of, inputs):
    torch.manual_seed(0)
    model = shaken(build())
    assert change(model, spec_of(model), inputs()) <= 1e-5


def test_a_resnet_of_depth_twenty_has_three_streams_and_nine_inner_groups():
    spec = resnet_spec(ResNet())
    assert sorted(name for name in spec.groups if name.startswith("S.")) == ["S.0", "S.1", "S.2"]
    assert len(spec.groups) == 12 and spec.groups["S.2"] == Flat(64)


def test_rotary_positions_forbid_orders_inside_queries_and_keys():
    torch.manual_seed(0)
    model, inputs = TRANSFORMERS["llama"]()
    model = shaken(model)
    spec = spec_for(model)
    freed = {
        name: Heads(group.kv, group.per_kv, group.dim, qk_inner=True) if isinstance(group, Heads) else group
        for name, group in spec.groups.items()
    }
    wrong = PermutationSpec(freed, spec.axes, spec.heads, spec.optional, spec.transposed)
    assert change(model, wrong, inputs) > 0.01
    with pytest.raises(ValueError):
        check_permutation_spec(model, wrong, inputs)
    check_permutation_spec(model, spec, inputs)


def test_multi_task_models_follow_their_backbone():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40
    )
    model = MultiTaskModel.from_backbone(tf.BertModel(config), tasks={"a": {"num_labels": 2}, "b": {"num_labels": 3}})
    model = shaken(model)
    spec = spec_for(model)
    assert spec.is_head("heads.a.classifier.weight") or any(spec.is_head(name) for name in model.state_dict())
    for task in ("a", "b"):
        assert change(model, spec, {**tokens(), "task": task}) <= 1e-5


def test_own_families_are_registered_and_others_refused():
    config = type("Config", (), {"model_type": "mine"})()
    with pytest.raises(KeyError, match="mine"):
        spec_for(config)
    spec = PermutationSpec({"P": Flat(4)}, {"w": ("P", None)})
    register_permutation_spec("mine", lambda config, names: spec)
    assert spec_for(config) == spec
    with pytest.raises(ValueError, match="overwrite=True"):
        register_permutation_spec("mine", lambda config, names: spec)


def test_specifications_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="names no group; known ones are P"):
        PermutationSpec({"P": Flat(4)}, {"w": ("Q", None)})
    with pytest.raises(ValueError, match="3 permuted axes"):
        PermutationSpec({"P": Flat(4)}, {"w": ("P", "P", "P")})
    spec = PermutationSpec({"P": Flat(4)}, {"w": ("P", None)})
    with pytest.raises(ValueError, match="says nothing about tensor 'v'"):
        Permutation.identity(spec).apply({"v": torch.ones(4)})
    with pytest.raises(ValueError, match="has 5 entries, but its group 'P' orders 4"):
        Permutation.identity(spec).apply({"w": torch.ones(5, 2)})
    with pytest.raises(ValueError, match="GroupNorm"):
        resnet_spec(ResNet(lambda channels: nn.GroupNorm(4, channels), blocks=1))


def test_a_wrong_group_is_found_out():
    torch.manual_seed(0)
    model = mlp(7, 12, 12, 4)
    spec = mlp_spec(model)
    wrong = replace(spec, axes={**spec.axes, "2.weight": ("P.1", "P.1")})
    with pytest.raises(ValueError, match="changes the outputs"):
        check_permutation_spec(model, wrong, torch.randn(5, 7))


def test_names_of_older_vit_files_are_known():
    spec = spec_for(TRANSFORMERS["vit"]()[0])
    old = "vit.encoder.layer.1.attention.attention.query.weight"
    assert spec.axes_of(old) == spec.axes_of("vit.layers.1.attention.q_proj.weight") == ("A.1:q", "R")


def test_a_configuration_alone_tells_the_specification():
    model, _ = TRANSFORMERS["bert"]()
    names = list(model.state_dict())
    assert spec_for(model.config).restricted(names).axes == spec_for(model).restricted(names).axes


def test_a_classifier_behind_a_flattening_takes_positions_together():
    assert vgg_spec(vgg()).axes["8.weight"] == ("P.2", "P.1*16")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.BloomConfig(), "ALiBi"),
        (tf.T5Config(), "relative positions"),
        (tf.MixtralConfig(), "router"),
        (tf.ConvNextConfig(), "depthwise"),
    ],
)
def test_families_without_such_symmetries_are_refused_by_name(config, reason):
    with pytest.raises(ValueError, match=f"'{config.model_type}'.*{reason}"):
        spec_for(config)


def test_a_shortcut_that_pads_channels_is_refused():
    model = ResNet(blocks=1)
    model.layer2[0].shortcut = nn.Sequential()
    with pytest.raises(ValueError, match="explicit 1x1 convolution"):
        resnet_spec(model)


def test_specifications_survive_json():
    for spec in (spec_for(TRANSFORMERS["gpt2"]()[0]), spec_for(TRANSFORMERS["llama"]()[0]), vgg_spec(vgg())):
        again = PermutationSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again.groups == spec.groups
        assert {name: tuple(axes) for name, axes in again.axes.items()} == dict(spec.axes)
