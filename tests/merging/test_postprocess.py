from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging import (
    check_post_processors,
    lines,
    list_post_processors,
    merge_state_dicts,
    merge_task_vectors,
    register_post_processor,
    svc,
)
from hf_atm.merging.postprocess import registry as postprocess
from hf_atm.merging.postprocess.lines import layer_of
from hf_atm.merging.postprocess.registry import apply_post_processors, prepare_post_processors

from . import reference_spectral as reference
from .testing_utils import as_numpy, random_vectors


@pytest.fixture
def clean_register(monkeypatch):
    monkeypatch.setattr(postprocess, "_PROCESSORS", dict(postprocess._PROCESSORS))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (1, 4), (4, 1)])
@pytest.mark.parametrize("alpha", [None, 0.05, 1.0])
def test_svc_matches_the_reference(shape, alpha):
    vectors = random_vectors(3, {"w": shape}, dtype=torch.float64)
    merged = merge_task_vectors(vectors, "task_arithmetic", names="abc")
    result = svc(merged, vectors, [1.0] * 3, list("abc"), alpha=alpha)["w"]
    arrays = [v["w"] for v in as_numpy(vectors)]
    expected = reference.svc(merged["w"].numpy(), arrays, 1 / 3 if alpha is None else alpha)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-9)


def test_svc_counts_only_tasks_that_respond():
    first, second = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    first[0, 0], second[0, 0], second[2, 1] = 2.0, 2.0, 5.0
    vectors = [{"w": first}, {"w": second}]
    result = svc({"w": first + second}, vectors, [1.0, 1.0], ["a", "b"])["w"]
    # The first direction was counted twice and the other once, by the only task that has it.
    torch.testing.assert_close(result, second)


@pytest.mark.parametrize("method", ["mean", "task_arithmetic", "iso_c"])
def test_svc_on_copies_gives_one_back(method):
    left = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 6)))[0]
    vector = {"w": torch.tensor(left if method == "iso_c" else left @ np.diag([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]))}
    merged = merge_task_vectors([vector] * 4, method)
    result = svc(merged, [vector] * 4, [1.0] * 4, list("abcd"))["w"]
    torch.testing.assert_close(result, vector["w"], atol=1e-10, rtol=0)


def test_svc_leaves_other_tensors_and_zeros_alone():
    shapes = {"bias": (5,), "embed.weight": (6, 4), "conv": (2, 2, 2, 2), "w": (5, 4)}
    vectors = random_vectors(2, shapes)
    merged = {**merge_task_vectors(vectors, "mean"), "w": torch.zeros(5, 4)}
    result = svc(merged, vectors, [1.0, 1.0], ["a", "b"])
    assert list(result) == list(merged) and all(torch.equal(result[key], merged[key]) for key in merged)


def test_svc_scores_outputs_in_both_layouts():
    vectors = random_vectors(3, {"h.weight": (6, 9), "h.bias": (6,)}, dtype=torch.float64)
    flipped = [{"h.weight": v["h.weight"].T.contiguous(), "h.bias": v["h.bias"]} for v in vectors]
    plain, turned = (
        svc(merge_task_vectors(v, "mean", names="abc"), v, [1.0] * 3, list("abc"))["h.weight"]
        for v in (vectors, flipped)
    )
    torch.testing.assert_close(turned.T, plain, atol=1e-10, rtol=0)


def test_svc_does_not_depend_on_the_order_of_the_inputs():
    vectors, weights, names = random_vectors(3, {"w": (7, 5)}), [1.0, 2.0, 0.5], ["c", "a", "b"]
    merged = merge_task_vectors(vectors, "mean", weights, names)
    result = svc(merged, vectors, weights, names)["w"]
    assert result.dtype == torch.float32
    assert torch.equal(result, svc(merged, vectors[::-1], weights[::-1], names[::-1])["w"])


def test_lines_by_depth():
    names = ["embed_tokens.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "layers.2.mlp.weight", "norm.weight"]
    result = lines({name: torch.ones(2, dtype=torch.float64) for name in names}, alpha=0.5, beta=1.0)
    np.testing.assert_allclose([float(result[name][0]) for name in names], [0.5, 0.5, 1.0, 1.5, 1.5], rtol=1e-12)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight", ("bert.encoder.layer", 11)),
        ("transformer.h.3.attn.c_attn.weight", ("transformer.h", 3)),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", ("decoder.block", 2)),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", ("vision_model.encoder.layers", 0)),
        ("resnet.encoder.stages.1.layers.0.layer.0.convolution.weight", ("resnet.encoder.stages", 1)),
        ("model.layers.weight", None),
        ("classifier.0.weight", None),
    ],
)
def test_layers_are_read_off_names(key, place):
    assert layer_of(key) == place


def test_each_stack_has_its_own_depth_and_one_layer_is_the_first():
    names = ["encoder.block.0.w", "encoder.block.2.w", "decoder.block.0.w"]
    result = lines({name: torch.ones(1) for name in names}, alpha=1.0, beta=1.0)
    assert [float(result[name]) for name in names] == [1.0, 2.0, 1.0]


def test_tensor_by_tensor_equals_the_whole_model():
    shapes = {f"layers.{index}.weight": (6, 4) for index in range(3)} | {"head.weight": (5, 4), "head.bias": (5,)}
    vectors, names, specs = random_vectors(3, shapes), list("abc"), ["svc", {"lines": {"alpha": 0.2, "beta": 0.8}}]
    merged = merge_task_vectors(vectors, "mean", names=names)
    context = prepare_post_processors(specs, sorted(shapes), vectors, [1.0] * 3, names, "mean")
    whole = apply_post_processors(specs, merged, vectors, [1.0] * 3, names, context)
    for key in shapes:
        part = [{key: v[key]} for v in vectors]
        alone = apply_post_processors(specs, {key: merged[key]}, part, [1.0] * 3, names, context)
        assert torch.equal(alone[key], whole[key])
    by_hand = lines(svc(merged, vectors, [1.0] * 3, names), alpha=0.2, beta=0.8)
    assert all(torch.equal(by_hand[key], whole[key]) for key in shapes)


def test_the_merge_method_decides_the_floor():
    vectors = random_vectors(3, {"w": (6, 5)})
    contexts = {m: prepare_post_processors(["svc"], ["w"], vectors, [1, 1, 0], "abc", m)[0] for m in ("mean", "tsv_m")}
    assert contexts["mean"].alpha == 0.5 and contexts["tsv_m"].alpha == 1.0
    given = prepare_post_processors([{"svc": {"alpha": 0.3}}], ["w"], vectors, [1, 1, 1], "abc", "tsv_m")
    assert given[0].alpha == 0.3


def test_whole_models_are_post_processed():
    base = random_vectors(1, {"layers.0.weight": (6, 4), "layers.1.weight": (6, 4), "head.bias": (6,)}, seed=5)[0]
    vectors = random_vectors(2, {key: tensor.shape for key, tensor in base.items()}, dtype=torch.float64)
    models = [{key: base[key].double() + vector[key] for key in base} for vector in vectors]
    specs = ["svc", {"lines": {"alpha": 0.0, "beta": 1.0}}]
    merged = merge_state_dicts(models, base, "mean", names=["a", "b"], postprocess=specs)
    update = merge_task_vectors(vectors, "mean", names=["a", "b"])
    expected = lines(svc(update, vectors, [1.0, 1.0], ["a", "b"]), alpha=0.0, beta=1.0)
    assert torch.equal(merged["layers.0.weight"], base["layers.0.weight"].double())
    for key in base:
        torch.testing.assert_close(merged[key] - base[key], expected[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("specs", "error", "words"),
    [
        (["svd"], KeyError, ["'svd'", "did you mean 'svc'", "lines, svc"]),
        ("svc", ValueError, ["must be a list", "['svc']"]),
        ([{"svc": {"alpa": 1.0}}], ValueError, ["'alpa'", "did you mean 'alpha'"]),
        ([{"svc": {"alpha": 0}}], ValueError, ["alpha=0", "positive"]),
        ([{"svc": {"non_matrix": "embed*"}}], ValueError, ["non_matrix='embed*'", "list"]),
        ([{"svc": 0.5}], ValueError, ["0.5", "mapping"]),
        (["lines"], ValueError, ["needs", "alpha, beta"]),
        ([{"lines": {"alpha": 1.0, "beta": float("nan")}}], ValueError, ["beta=nan", "finite"]),
        ([{"svc": None, "lines": None}], ValueError, ["one name"]),
        ([3], ValueError, ["3", "name"]),
    ],
)
def test_bad_lists_are_refused_in_one_sentence(specs, error, words):
    with pytest.raises(error) as raised:
        check_post_processors(specs)
    message = str(raised.value.args[0])
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


def test_register(clean_register):
    @register_post_processor("shrink", ranges={"factor": ("a positive number", lambda v: v > 0)})
    def shrink(merged, task_vectors, weights, names, *, factor=0.5):
        return {key: factor * tensor for key, tensor in merged.items()}

    assert list_post_processors() == ["lines", "shrink", "svc"]
    specs = ["shrink", {"shrink": {"factor": 3.0}}, {"shrink": None}]
    context = prepare_post_processors(specs, ["w"], [], [], [], "mean")
    assert apply_post_processors(specs, {"w": torch.ones(1)}, [], [], [], context)["w"].item() == 0.75
    with pytest.raises(ValueError, match="already registered"):
        register_post_processor("shrink")(shrink)
    register_post_processor("shrink", overwrite=True)(shrink)
    with pytest.raises(ValueError, match="merged, task_vectors, weights, names"):
        register_post_processor("other")(lambda merged: merged)
