"""Adapters cut to a rank, dense updates, residuals, and what lies on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_atm.merging import merge_adapter_folders, merge_adapters

from . import reference_adapters
from .testing_utils import (
    MODELS,
    adapted,
    assert_updates,
    base_model,
    loaded_update,
    pair,
    toy_adapters,
    true_update,
)


def exact(base, models, method="mean", **kwargs):
    return dict(merge_adapters([pair(model) for model in models], method, output="delta", **kwargs).deltas)


@pytest.mark.parametrize("method", ["mean", "ties", "tsv_m"])
@pytest.mark.parametrize("svd_rank", [None, 1, 3])
def test_svd_is_the_best_approximation_of_its_rank(method, svd_rank, tmp_path):
    base = base_model("toy")
    models = toy_adapters(3, base)
    dense = exact(base, [model.double() for model in models], method)
    merged = merge_adapters([pair(model) for model in models], method, output="svd", svd_rank=svd_rank)
    merged.save_pretrained(tmp_path / "merged")
    expected, lost, total = {}, 0.0, 0.0
    for name, update in dense.items():
        best, share = reference_adapters.truncate(update.numpy(), svd_rank or 2)
        expected[name] = torch.as_tensor(best)
        assert share > 1e-3, "the merge fits the rank by itself"
        assert abs(merged.report["modules"][name.removesuffix(".weight")]["lost_energy"] - share) <= 1e-6
        lost, total = lost + share * float(update.square().sum()), total + float(update.square().sum())
    assert_updates(loaded_update(base, tmp_path / "merged"), expected, tolerance=1e-5)
    assert abs(merged.report["lost_energy"] - lost / total) <= 1e-6
    assert merged.config.r == (svd_rank or 2)


def test_svd_of_full_space_equals_dense_truncation(tmp_path):
    base = base_model("toy")
    models = toy_adapters(3, base)
    dense = exact(base, models, "ties", space="full")
    merged = merge_adapters([pair(model) for model in models], "ties", output="svd", svd_rank=4, space="full")
    merged.save_pretrained(tmp_path / "merged")
    expected = {
        name: torch.as_tensor(reference_adapters.truncate(update.double().numpy(), 4)[0])
        for name, update in dense.items()
    }
    assert_updates(loaded_update(base, tmp_path / "merged"), expected, tolerance=1e-5)


@pytest.mark.parametrize("method", ["ties", "tsv_m", "iso_c", "dare"])
@pytest.mark.parametrize("space", ["core", "full"])
def test_cat_of_other_methods_is_exact(method, space, tmp_path):
    base = base_model("toy")
    models = toy_adapters(3, base)
    kwargs = {"density": 0.5} if method == "dare" else {}
    names = ["a", "b", "c"]
    merged = merge_adapters([pair(model) for model in models], method, space=space, names=names, **kwargs)
    merged.save_pretrained(tmp_path / "merged")
    expected = exact(base, models, method, space=space, names=names, **kwargs)
    assert_updates(loaded_update(base, tmp_path / "merged"), {k: v.double() for k, v in expected.items()}, 1e-5)
    if space == "core":
        assert merged.config.r <= 6


def test_ranks_that_differ_by_module_become_patterns(tmp_path):
    base = base_model("toy")
    models = [
        adapted(base, 1, ["first", "second"], r=2, rank_pattern={"second": 4}),
        adapted(base, 2, ["first", "second"], r=3),
    ]
    for output, ranks in (("cat", (5, 7)), ("svd", (3, 4))):
        merged = merge_adapters([pair(model) for model in models], output=output)
        assert tuple(merged.report["modules"][name]["rank"] for name in ("first", "second")) == ranks
        merged.save_pretrained(tmp_path / output)
        loaded = PeftModel.from_pretrained(base_model("toy"), str(tmp_path / output)).base_model.model
        assert (loaded.first.r["default"], loaded.second.r["default"]) == ranks
        assert loaded.first.scaling["default"] == loaded.second.scaling["default"] == 1.0


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", ["mean", "ties"])
def test_residual_and_adapter_are_exact_together(architecture, method, tmp_path):
    base, targets = base_model(architecture), MODELS[architecture][1]
    models = [adapted(base, 1, targets, r=2), adapted(base, 2, targets, r=3, use_rslora=True)]
    merged = merge_adapters([pair(model) for model in models], method, [1.0, -0.5], output="residual")
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "update.safetensors").is_file()
    adapter = loaded_update(base, tmp_path / "merged")
    assert merged.config.r == 3
    expected = exact(base, models, method, weights=[1.0, -0.5])
    together = {name: adapter[name] + merged.deltas[name] for name in merged.deltas}
    assert_updates(together, {name: tensor.double() for name, tensor in expected.items()})
    assert all(merged.deltas[name].abs().max() > 1e-3 for name in merged.deltas)


def test_a_residual_also_holds_what_rounding_took_from_the_factors():
    base = base_model("toy")
    model = toy_adapters(1, base)[0]
    merged = merge_adapters([pair(model)] * 2, output="residual", dtype=torch.bfloat16)
    a, b = (merged.factors[f"base_model.model.first.lora_{name}.weight"].double() for name in "AB")
    update = true_update(base, model)["first.weight"]
    assert (b @ a - update).abs().max() > 1e-3
    assert (b @ a + merged.deltas["first.weight"].double() - update).abs().max() <= 2e-5


@pytest.mark.parametrize("architecture", MODELS)
def test_a_delta_folds_into_models_and_state_dicts(architecture):
    base, targets = base_model(architecture), MODELS[architecture][1]
    models = [adapted(base, seed, targets) for seed in (1, 2)]
    merged = merge_adapters([pair(model) for model in models], output="delta")
    assert merged.config is None and not merged.factors
    updates = [true_update(base, model) for model in models]
    tied = [name for name in merged.deltas if "wte" in name or "embed_tokens" in name]
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    state = merged.apply_to(base.state_dict())
    for name, tensor in state.items():
        moved = sum(update[name] for update in updates) / 2 if name in merged.deltas else 0
        assert (tensor.double() - start[name].double() - moved).abs().max() <= 1e-6, name
        assert torch.equal(base.state_dict()[name], start[name]), "the given state dict was changed"
    assert merged.apply_to(base) is base
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not tied or architecture == "llama"


def test_transposed_matrices_are_recognised_in_the_base():
    base = base_model("gpt2")
    models = [adapted(base, seed, ["c_attn", "c_proj"]) for seed in (1, 2)]
    pairs = [pair(model) for model in models]
    expected = exact(base, models)
    for config, _ in pairs:
        # As a model with other linear layers leaves it.
        config.fan_in_fan_out = False
    merged = merge_adapters(pairs, output="delta")
    with pytest.raises(ValueError, match="fan_in_fan_out is wrong for .*c_attn.*pass the model itself"):
        merged.apply_to(base.state_dict())
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged.apply_to(base)
    for name, update in expected.items():
        assert (base.state_dict()[name] - start[name] - update).abs().max() <= 1e-6


def test_a_tied_weight_is_not_moved_by_half_its_meaning():
    base = base_model("gpt2")
    models = [adapted(base, seed, ["wte"]) for seed in (1, 2)]
    merged = merge_adapters([pair(model) for model in models], output="delta")
    with pytest.raises(ValueError, match="lm_head.weight.*tied.*output='cat'"):
        merged.apply_to(base)
    with pytest.raises(ValueError, match="tied"):
        merged.apply_to(base.state_dict())


def test_what_cannot_be_folded_changes_nothing():
    base = base_model("toy")
    models = toy_adapters(2, base)
    merged = merge_adapters([pair(model) for model in models], output="delta")
    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no 'first.weight'.*class"):
        merged.apply_to(other)
    state = {**base.state_dict(), "second.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"second.weight.*\(3, 3\).*\(10, 20\)"):
        merged.apply_to(state)
    state["second.weight"] = torch.zeros(10, 20, dtype=torch.int8)
    with pytest.raises(ValueError, match="second.weight.*quantised"):
        merged.apply_to(state)
    with pytest.raises(ValueError, match="no dense update.*output='delta'"):
        merge_adapters([pair(model) for model in models]).apply_to(base)


def test_a_half_precision_base_is_rounded_once():
    base = base_model("toy").to(torch.bfloat16)
    models = toy_adapters(2)
    merged = merge_adapters([pair(model) for model in models], output="delta")
    state = merged.apply_to(base.state_dict())
    expected = (base.state_dict()["first.weight"].float() + merged.deltas["first.weight"]).to(torch.bfloat16)
    assert torch.equal(state["first.weight"], expected)


def test_different_targets_are_written_by_whole_names(tmp_path):
    base = base_model("bert")
    models = [adapted(base, 1, ["query"]), adapted(base, 2, ["pooler.dense"])]
    merged = merge_adapters([pair(model) for model in models], strict=False)
    merged.save_pretrained(tmp_path / "merged")
    found = loaded_update(base, tmp_path / "merged")
    assert sorted(found) == ["bert.encoder.layer.0.attention.self.query.weight", "bert.pooler.dense.weight"]


def test_common_targets_stay_as_they_were():
    models = [adapted(base_model("llama"), seed, ["q_proj", "down_proj"]) for seed in (1, 2)]
    merged = merge_adapters([pair(model) for model in models])
    assert merged.config.target_modules == ["down_proj", "q_proj"]


def test_folders_become_a_folder(tmp_path):
    base = base_model("toy")
    models = toy_adapters(3, base)
    names = ["sst2", "cola", "mnli"]
    for name, model in zip(names, models, strict=True):
        model.save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in names]
    out = tmp_path / "deep" / "merged"
    merge_adapter_folders(folders, out, weights=[1.0, 2.0, 3.0], method="ties", density=0.5, output="svd", svd_rank=2)
    record = json.loads((out / "merge_config.json").read_text())
    assert record["method"] == "ties" and record["parameters"] == {"density": 0.5}
    assert [(entry["name"], entry["weight"]) for entry in record["inputs"]] == [
        ("cola", 2.0),
        ("mnli", 3.0),
        ("sst2", 1.0),
    ]
    assert all(len(entry["sha256"]) == 64 for entry in record["inputs"])
    assert {"peft", "torch"} <= set(record["versions"])
    assert sorted(os.listdir(out.parent)) == ["merged"], "something temporary was left"
    first = load_file(out / "adapter_model.safetensors")
    # A second merge replaces the first; anything else is left alone.
    merge_adapter_folders(folders, out)
    assert len(load_file(out / "adapter_model.safetensors")) == len(first)
    assert json.loads((out / "merge_config.json").read_text())["method"] == "mean"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="other.*holds something else"):
        merge_adapter_folders(folders, other)
    assert os.listdir(other) == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        merge_adapter_folders(folders, other / "thesis.tex")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    merged = merge_adapters([pair(model) for model in toy_adapters(2)])
    merged.save_pretrained(tmp_path / "merged")
    before = (tmp_path / "merged" / "adapter_model.safetensors").read_bytes()
    from hf_atm.merging.adapters import folder

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(folder, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        merged.save_pretrained(tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]
    assert (tmp_path / "merged" / "adapter_model.safetensors").read_bytes() == before


def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    merged = merge_adapters([pair(model) for model in toy_adapters(2)])
    merged.save_pretrained(tmp_path / "merged")
    os.rename(tmp_path / "merged", tmp_path / ".merged.old")
    from hf_atm.merging.adapters import folder

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_file", full_disk)
        with pytest.raises(OSError):
            merged.save_pretrained(tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


SCRIPT = """
import sys
from hf_atm.merging import merge_adapter_folders
for method, kwargs in (("mean", {}), ("dare_ties", {"density": 0.5}), ("tsv_m", {})):
    merge_adapter_folders(sys.argv[2:], f"{sys.argv[1]}/{method}", method=method, strict=False, **kwargs)
"""


def test_the_files_are_the_same_in_every_process(tmp_path, monkeypatch):
    base = base_model("toy")
    for name, targets in (("one", ["first", "second"]), ("two", ["second"]), ("three", ["first"])):
        adapted(base, len(name), targets).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("one", "two", "three")]
    # Another hash seed, and another order of the inputs.
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "there"), *folders[::-1]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "here"), *folders])
    with pytest.warns(UserWarning, match="zero updates"):
        exec(compile(SCRIPT, "script", "exec"), {})
    for method in ("mean", "dare_ties", "tsv_m"):
        here, there = tmp_path / "here" / method, tmp_path / "there" / method
        assert sorted(os.listdir(here)) == sorted(os.listdir(there))
        for name in os.listdir(here):
            assert (here / name).read_bytes() == (there / name).read_bytes(), name
