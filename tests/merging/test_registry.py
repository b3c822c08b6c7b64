from __future__ import annotations

import inspect

import pytest
import torch

from hf_atm.merging import (
    check_merge_kwargs,
    get_merge_method,
    list_merge_methods,
    merge_task_vectors,
    register_merge_method,
    registry,
)

from .testing_utils import METHODS, SPECIAL_METHODS


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_known_methods_and_families():
    assert list_merge_methods() == sorted([*METHODS, *SPECIAL_METHODS])
    families = {name: get_merge_method(name).family for name in METHODS}
    assert {name for name in METHODS if families[name] == "linear"} == {"mean", "linear", "task_arithmetic"}
    assert {name for name in METHODS if families[name] == "spectral"} == {"tsv_m", "iso_c", "iso_cts"}
    assert {name for name in METHODS if not get_merge_method(name).requires_base} == {"mean", "linear"}


def test_parameters_come_from_the_signature():
    ties = get_merge_method("ties")
    assert ties.parameters["density"] == 0.2 and ties.parameters["trim_scope"] == "model"
    assert get_merge_method("dare").parameters["density"] is inspect.Parameter.empty
    assert get_merge_method("dare").required == ("density",)
    with pytest.raises(TypeError):
        ties.parameters["density"] = 1.0


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(KeyError, match="'tise'.*breadcrumbs.*ties"):
        get_merge_method("tise")


def test_register_use_and_overwrite(clean_registry):
    @register_merge_method("double", family="elementwise")
    def double(task_vectors, weights, names, *, factor=2.0):
        return {key: factor * tensor for key, tensor in task_vectors[0].items()}

    assert "double" in list_merge_methods()
    merged = merge_task_vectors([{"w": torch.ones(2)}], "double", factor=3.0)
    assert merged["w"].tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="already registered"):
        register_merge_method("double", family="elementwise")(double)
    register_merge_method("double", family="linear", overwrite=True)(double)
    assert get_merge_method("double").family == "linear"
    with pytest.raises(ValueError, match="family"):
        register_merge_method("other", family="magic")
    with pytest.raises(ValueError, match="task_vectors, weights, names"):
        register_merge_method("other", family="linear")(lambda vectors: {})
    assert "other" not in list_merge_methods()


def test_function_with_open_keywords_accepts_any(clean_registry):
    @register_merge_method("open", family="elementwise")
    def function(task_vectors, weights, names, **kwargs):
        return dict(task_vectors[0])

    assert check_merge_kwargs("open", {"anything": 1}) == {"anything": 1}


@pytest.mark.parametrize(
    ("method", "kwargs", "words"),
    [
        ("ties", {"densty": 0.2}, ["'densty'", "density", "trim_scope"]),
        ("mean", {"density": 0.2}, ["'density'", "normalize"]),
        ("ties", {"density": 0}, ["density=0", "(0, 1]"]),
        ("ties", {"density": 1.01}, ["density=1.01"]),
        ("ties", {"density": float("nan")}, ["density=nan"]),
        ("ties", {"density": "0.2"}, ["density='0.2'"]),
        ("ties", {"density": True}, ["density=True"]),
        ("breadcrumbs", {"gamma": 1.0}, ["gamma=1.0", "[0, 1)"]),
        ("breadcrumbs", {"gamma": -0.1}, ["gamma=-0.1"]),
        ("breadcrumbs", {"gamma": 0.9}, ["gamma=0.9", "density=0.143", "sum"]),
        ("dare", {"density": 0.5, "seed": 1.5}, ["seed=1.5", "integer"]),
        ("dare", {"density": 0.5, "rescale": 1}, ["rescale=1", "True or False"]),
        ("dare", {}, ["needs", "density"]),
        ("dare_ties", {}, ["needs", "density"]),
        ("ties", {"trim_scope": "layer"}, ["trim_scope='layer'", "'model'", "'tensor'"]),
        ("ties", {"majority_sign_method": "sum"}, ["'total'", "'frequency'"]),
        ("ties", {"merge_func": "median"}, ["'mean'", "'sum'", "'max'"]),
        ("ties", {"min_sparse_numel": -1}, ["min_sparse_numel=-1"]),
        ("iso_c", {"rank_rule": "half"}, ["'numerical'", "'full'"]),
        ("iso_c", {"a": 2}, ["a=2"]),
        ("tsv_m", {"non_matrix": "embed*"}, ["non_matrix='embed*'", "list"]),
        ("mean", {"scaling_coefficient": "auto"}, ["scaling_coefficient='auto'", "'norm'"]),
        ("mean", {"scaling_factor": float("inf")}, ["scaling_factor=inf"]),
        ("mean", {"scaling_factor": 1.0, "scaling_coefficient": 1.0}, ["not both"]),
    ],
)
def test_bad_keywords_are_refused_in_one_sentence(method, kwargs, words):
    with pytest.raises(ValueError) as error:
        check_merge_kwargs(method, kwargs)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


def test_good_keywords_pass_and_the_alias_is_resolved():
    assert check_merge_kwargs("breadcrumbs", {"gamma": 0.007, "density": 0.993}) == {"gamma": 0.007, "density": 0.993}
    assert check_merge_kwargs("ties", {"scaling_factor": 0.3}) == {"scaling_coefficient": 0.3}
    assert check_merge_kwargs("mean", {"scaling_coefficient": "norm"}) == {"scaling_coefficient": "norm"}


def test_ranges_are_checked_before_the_tensors_are_touched():
    class Untouchable(dict):
        def __getitem__(self, key):
            raise AssertionError("work started")

        __iter__ = items = keys = __getitem__

    with pytest.raises(ValueError, match="density"):
        merge_task_vectors([Untouchable()], "ties", density=2)


def test_an_unknown_method_is_answered_with_the_nearest_one():
    with pytest.raises(KeyError, match="'tise'; did you mean 'ties'. Known methods are adamerging, "):
        get_merge_method("tise")
