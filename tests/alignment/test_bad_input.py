"""What cannot be aligned is refused in one sentence before any work, and inputs are left as they are."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from hf_atm.alignment import Alignment, Flat, PermutationSpec, align, mlp_spec

from .networks import TRANSFORMERS, mlp


SIZES = (12, 32, 32, 5)


def transformer(name, seed=0):
    torch.manual_seed(seed)
    return TRANSFORMERS[name]()[0]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return [mlp(*SIZES).state_dict() for _ in range(2)]


@pytest.fixture(autouse=True)
def unchanged(pair):
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in pair]
    yield
    for state, kept in zip(pair, before, strict=True):
        assert list(state) == list(kept)
        assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


@pytest.fixture
def spec():
    return mlp_spec(mlp(*SIZES))


@contextmanager
def refused(message):
    with pytest.raises(ValueError, match=message) as error:
        yield
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_models_are_refused(pair, spec, count):
    with refused(f"Got {count} models"):
        align(pair[:count], spec)
    with refused("one model"):
        align(pair[0], spec)


def test_models_with_other_tensors_are_refused(pair, spec):
    lacking = {name: tensor for name, tensor in pair[1].items() if name != "2.bias"}
    with refused("lack '2.bias'"):
        align([pair[0], lacking], spec)


def test_models_with_other_shapes_are_refused(pair, spec):
    for shape in ((32, 13), (31, 12)):
        with refused(rf"'0.weight' has shapes .* and \({shape[0]}, {shape[1]}\)"):
            align([pair[0], {**pair[1], "0.weight": torch.zeros(shape)}], spec)


def test_models_of_different_families_are_refused():
    with refused("different types .vit, llama."):
        align([transformer("vit"), transformer("llama")])


def test_state_dicts_need_a_specification(pair):
    with refused("pass spec="):
        align(pair)
    with refused("Sequential has no config.model_type"):
        align([mlp(*SIZES), mlp(*SIZES)])


def test_uncovered_tensors_are_refused(pair, spec):
    with refused("nothing about tensor 'extra'"):
        align([{**state, "extra": torch.zeros(3)} for state in pair], spec)


def test_patterns_without_tensors_are_refused(pair, spec):
    with refused("'7.weight' match no tensor"):
        align(pair, replace(spec, axes={**spec.axes, "7.weight": ("P.0",)}))


def test_group_sizes_that_do_not_fit_are_refused(pair, spec):
    with refused("has 32 entries, but its group 'P.0' orders 31"):
        align(pair, replace(spec, groups={**spec.groups, "P.0": Flat(31)}))


def test_axes_that_do_not_fit_are_refused(pair, spec):
    with refused("has 2 dimensions, its specification 1"):
        align(pair, replace(spec, axes={**spec.axes, "0.weight": ("P.0",)}))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), "quantised"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "quantised"),
        (lambda tensor: tensor.to("meta"), "meta device"),
        (lambda tensor: tensor / 0, "not finite"),
    ],
)
def test_tensors_without_usable_values_are_refused(pair, spec, broken, message):
    with refused(f"'2.weight' of model 1.*{message}"):
        align([pair[0], {**pair[1], "2.weight": broken(pair[1]["2.weight"])}], spec)


def test_ties_in_one_model_only_are_refused():
    models = [transformer("bert masked", seed) for seed in range(2)]
    state = dict(models[1].state_dict())
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    with refused("tied in one model and differ in another"):
        align([models[0], state])


def test_equal_copies_count_as_tied():
    models = [transformer("bert masked", seed) for seed in range(2)]
    copies = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    found = align([models[0], copies], max_iter=2)
    assert found.objective == align(models, max_iter=2).objective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mean"}, "method='mean' is unknown"),
        ({"starts": ["nowhere"]}, "starts="),
        ({"starts": []}, "starts="),
        ({"max_iter": 0}, "max_iter=0"),
        ({"polish": -1}, "polish=-1"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"heads": "0.*"}, "heads must be a list"),
        ({"heads": ["*"]}, "No tensor is left"),
        ({"method": "activations"}, "needs data"),
        ({"method": "activations", "data": [torch.zeros(2, 12)]}, "cannot be run"),
    ],
)
def test_arguments_out_of_range_are_refused(pair, spec, arguments, message):
    with refused(message):
        align(pair, spec, **arguments)


def test_features_that_do_not_fit_are_refused(pair, spec):
    good = {"P.0": torch.randn(9, 32), "P.1": torch.randn(9, 32)}
    for features, message in (
        ([good], "features of 1 models"),
        ([good, {**good, "P.0": torch.randn(8, 32)}], "same rows"),
        ([{name: x[:, 1:] for name, x in good.items()}] * 2, "give .samples, 32."),
        ([{"P.0": good["P.0"]}] * 2, "lack the groups P.1"),
        ([good, {**good, "P.1": good["P.1"] / 0}], "not finite"),
    ):
        with refused(message):
            align(pair, spec, "activations", features)


def test_maps_of_models_that_are_not_there_are_refused(pair, spec, tmp_path):
    found = align(pair, spec, max_iter=1)
    with refused("no model 2"):
        found.map(0, 2)
    (tmp_path / "no").write_text("nothing")
    with refused("no safetensors file"):
        Alignment.load(tmp_path / "no")


def test_data_without_batches_are_refused(spec):
    models = [mlp(*SIZES) for _ in range(2)]
    with refused("gave no batch"):
        align(models, spec, "activations", iter([]))


def test_ties_that_the_specification_would_break_are_refused(pair):
    state = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    tied = [{"a.weight": tensor, "b.weight": tensor} for tensor in state.values()]
    spec = PermutationSpec({"P": Flat(4)}, {"a.weight": ("P", None), "b.weight": (None, "P")})
    with refused("are tied, but the specification orders them differently"):
        align(tied, spec)
    assert align([state, {**state}], spec).map(0, 1).is_identity
