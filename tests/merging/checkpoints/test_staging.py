"""What lies around a merge: other folders, kills at the worst moment, links, systems without `pwrite`."""

from __future__ import annotations

import json
import os

import pytest
import torch

from hf_atm.merging import merge_checkpoints
from hf_atm.merging.checkpoints import staging

from .testing_utils import SHAPES, load_checkpoint, write_checkpoint, write_models


@pytest.fixture
def recipe(tmp_path):
    return {**write_models(tmp_path), "merge_method": "task_arithmetic"}


def merge(recipe, output, **options):
    return merge_checkpoints(recipe, output, progress=False, **options)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_an_output_inside_an_input_is_refused(recipe, tmp_path):
    before = sorted(path.name for path in (tmp_path / "base").iterdir())
    with pytest.raises(ValueError, match="lies in the model .*outside of it"):
        merge(recipe, tmp_path / "base" / "merged")
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == before


def test_folders_of_others_stay(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="out.replaced.*no merge wrote it"):
        merge(recipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.replaced" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("call", "method"), [("create", "task_arithmetic"), ("rename", "task_arithmetic"), ("rename", "ties")]
)
def test_a_kill_around_the_work_leaves_something_to_go_on_with(call, method, recipe, tmp_path, monkeypatch):
    # Elementwise methods with this scale keep their vectors in a file until all norms are known.
    recipe |= {"merge_method": method, "parameters": {"scaling_coefficient": "norm"}}
    merge(recipe, tmp_path / "expected")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if call == "create":
            patch.setattr("hf_atm.merging.checkpoints.merge.create_files", killed)
        else:
            patch.setattr(staging.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.incomplete").is_dir()
    result = merge(recipe, tmp_path / "out")
    assert result.resumed == (call == "rename")
    assert same(load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "expected"))
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "expected"))


def test_a_link_as_output_is_followed(recipe, tmp_path):
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "place")
    merge(recipe, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "place" / "model.safetensors").is_file()
    assert os.listdir(tmp_path / "disk") == ["place"]


def test_systems_that_cannot_write_at_a_position(recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "expected")
    monkeypatch.delattr(os, "pwrite")
    merge(recipe, tmp_path / "out", threads=4)
    assert same(load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "expected"))


def test_adapters_are_not_checkpoints(recipe, tmp_path):
    (tmp_path / "m1" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="m1' is an adapter.*use merge_adapters"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_configuration_names_the_type_of_the_weights(tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "mean"}
    config = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}}
    tensors = load_checkpoint(tmp_path / "base")
    half = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    write_checkpoint(tmp_path / "base", half, config)
    merge(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32"},
    }


def test_what_is_taken_over_must_fit_the_type_too(tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "mean", "exclude": ["keep"], "out_dtype": "float16"}
    for name in ("base", "m0", "m1", "m2"):
        tensors = load_checkpoint(tmp_path / name)
        write_checkpoint(tmp_path / name, {**tensors, "keep": torch.tensor([1e6])})
    with pytest.raises(ValueError, match="'keep' overflows torch.float16"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_checkpoint(tmp_path / "base", {**load_checkpoint(tmp_path / "base"), "keep": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="'keep' has entries that are not a number"):
        merge(recipe, tmp_path / "out")


@pytest.mark.parametrize("reverse", [False, True])
def test_weights_stored_as_integers_are_refused(reverse, tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "mean"}
    quantised = ("base",) if reverse else ("base", "m0", "m1", "m2")
    for name in quantised:
        tensors = load_checkpoint(tmp_path / name)
        tensors["model.layers.0.mlp.weight"] = (tensors["model.layers.0.mlp.weight"] * 100).to(torch.int8)
        write_checkpoint(tmp_path / name, tensors)
    with pytest.raises(ValueError, match="mlp.weight.*(quantised|dequantise)"):
        merge(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "weights", "words"),
    [
        ("mean", [1, -1, 0], "sum to zero"),
        ("ties", [1, -1, 0], "sum to zero"),
        ("slerp", [1, 1, 1], "from one model to another"),
    ],
)
def test_a_dry_run_sees_what_the_method_cannot_do(method, weights, words, recipe, tmp_path):
    for model, weight in zip(recipe["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    recipe["merge_method"] = method
    with pytest.raises(ValueError, match=words):
        merge(recipe, tmp_path / "out", dry_run=True)


def test_other_statistics_start_afresh(tmp_path, recipe):
    from hf_atm.merging.checkpoints.job import open_job
    from hf_atm.merging.checkpoints.recipe import read_recipe

    statistics = {"model.layers.0.mlp.weight": torch.eye(7)}
    for index, model in enumerate(recipe["models"]):
        write_checkpoint(tmp_path / f"s{index}", statistics)
        model["statistics"] = str(tmp_path / f"s{index}" / "model.safetensors")
    content = {**recipe, "merge_method": "regmean"}
    first = open_job(read_recipe(content)).identity()
    assert open_job(read_recipe(content)).identity() == first
    write_checkpoint(tmp_path / "s0", {"model.layers.0.mlp.weight": 2 * torch.eye(7)})
    os.utime(tmp_path / "s0" / "model.safetensors", ns=(1, 1))
    assert open_job(read_recipe(content)).identity() != first


def test_notes_say_what_might_surprise(tmp_path):
    recipe = {**write_models(tmp_path, dtype=torch.bfloat16), "merge_method": "dare"}
    recipe |= {"parameters": {"density": 0.5}, "exclude": ["*.clasifier.*"]}
    notes = merge(recipe, tmp_path / "out", dry_run=True).notes
    assert any("*.clasifier.*" in note for note in notes)
    assert any("half precision" in note for note in notes) and any("a sum in mergekit" in note for note in notes)
    plain = {
        **write_models(tmp_path / "single"),
        "merge_method": "dare",
        "parameters": {"density": 0.5, "normalize": False},
    }
    assert merge(plain, tmp_path / "out", dry_run=True).notes == []


def test_merged_prototypes_are_pointed_out(tmp_path):
    recipe = write_models(tmp_path, shapes={**SHAPES, "heads.few.prototypes": (3, 4)})
    (note,) = merge(recipe, tmp_path / "out", dry_run=True).notes
    assert "heads.few.prototypes" in note and "hf_atm.refresh_prototypes" in note
