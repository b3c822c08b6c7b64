"""Every wrong input ends in one sentence before work starts, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_atm.merging import merge_checkpoints
from hf_atm.merging.checkpoints import job as job_module

from .testing_utils import load_checkpoint, write_checkpoint, write_models


@pytest.fixture
def recipe(tmp_path):
    return {**write_models(tmp_path), "merge_method": "task_arithmetic"}


def refused(recipe, tmp_path, error, match, **kwargs):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        merge_checkpoints(recipe, tmp_path / "out", progress=False, **kwargs)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value).strip()


def change(folder, **tensors):
    write_checkpoint(folder, {**load_checkpoint(folder), **tensors})


def test_shapes_names_and_prefixes(recipe, tmp_path):
    change(tmp_path / "m1", **{"model.layers.0.mlp.bias": torch.ones(13)})
    refused(recipe, tmp_path, ValueError, r"mlp.bias \(\(12,\) vs \(13,\)\).*exclude.*task_specific_modules")
    change(tmp_path / "m1", **{"model.layers.0.mlp.bias": torch.ones(12), "extra.weight": torch.ones(2)})
    refused(recipe, tmp_path, ValueError, r"extra.weight \(missing in 3 of 4 inputs\)")
    for index in range(3):
        tensors = {f"bert.{key}": value for key, value in load_checkpoint(tmp_path / f"m{index}").items()}
        write_checkpoint(tmp_path / f"m{index}", tensors)
    refused(recipe, tmp_path, ValueError, "prefix 'bert.'.*bare backbone")


def test_types(recipe, tmp_path):
    change(tmp_path / "m1", **{"model.layers.0.mlp.bias": torch.ones(12, dtype=torch.int8)})
    refused(recipe, tmp_path, ValueError, "mlp.bias' is floating point in some models and not in others")
    change(tmp_path / "m1", **{"model.layers.0.mlp.bias": torch.ones(12).to(torch.float8_e4m3fn)})
    refused(recipe, tmp_path, ValueError, "quantised.*dequantise")


def test_half_precision_beside_single_is_fine(recipe, tmp_path):
    change(tmp_path / "m1", **{"model.layers.0.mlp.bias": torch.ones(12).bfloat16()})
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert load_checkpoint(tmp_path / "out")["model.layers.0.mlp.bias"].dtype == torch.float32


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "model_stock", "iso_c"])
def test_not_a_number(method, recipe, tmp_path):
    bad = load_checkpoint(tmp_path / "m2")["model.layers.0.mlp.weight"]
    bad[3, 3] = float("nan")
    change(tmp_path / "m2", **{"model.layers.0.mlp.weight": bad})
    recipe = {**recipe, "merge_method": method}
    with pytest.raises(ValueError, match="'model.layers.0.mlp.weight' of 'm2' has entries that are not finite"):
        merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_overflow_of_the_output_type(recipe, tmp_path):
    change(tmp_path / "m0", **{"model.scale": torch.tensor(1e6)})
    with pytest.raises(ValueError, match="'model.scale' overflows torch.float16.*wider output type"):
        merge_checkpoints(recipe, tmp_path / "out", out_dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


def test_pickles_are_never_read(recipe, tmp_path):
    (tmp_path / "m1" / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, tmp_path / "m1" / "pytorch_model.bin")
    refused(recipe, tmp_path, ValueError, "pytorch_model.bin.*never read.*save_pretrained")
    recipe["models"][1]["model"] = str(tmp_path / "m1" / "pytorch_model.bin")
    refused(recipe, tmp_path, ValueError, "not a safetensors file")


def test_damaged_files(recipe, tmp_path):
    file = tmp_path / "m1" / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-9], whole[:40], b"", whole[:8] + b"x" + whole[9:]):
        file.write_bytes(part)
        refused(recipe, tmp_path, ValueError, "m1.*truncated or corrupt.*again")


def test_damaged_shards(tmp_path):
    recipe = write_models(tmp_path, shards=2)
    index = tmp_path / "m1" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "lost": "model-00001-of-00002.safetensors"}}))
    refused(recipe, tmp_path, ValueError, "lists tensors.*'lost'")
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    refused(recipe, tmp_path, FileNotFoundError, "lacks '../../secret.safetensors'")
    index.write_text("{}")
    refused(recipe, tmp_path, ValueError, "not an index")
    index.write_text(json.dumps(content))
    shutil.copy(
        tmp_path / "m1" / "model-00001-of-00002.safetensors", tmp_path / "m1" / "model-00002-of-00002.safetensors"
    )
    refused(recipe, tmp_path, ValueError, "in two files")
    (tmp_path / "m1" / "model-00002-of-00002.safetensors").unlink()
    refused(recipe, tmp_path, FileNotFoundError, "lacks 'model-00002")


def test_models_that_are_not_there(recipe, tmp_path):
    recipe["models"][1]["model"] = "./nowhere"
    refused(recipe, tmp_path, FileNotFoundError, "'./nowhere' is neither a folder nor a Hub id")
    recipe["models"][1]["model"] = "nobody/nothing"
    refused(recipe, tmp_path, FileNotFoundError, "'nobody/nothing'.*could not be fetched")
    (tmp_path / "empty").mkdir()
    recipe["models"][1]["model"] = str(tmp_path / "empty")
    refused(recipe, tmp_path, FileNotFoundError, "holds no safetensors file")
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / "empty" / f"{name}.safetensors")
    refused(recipe, tmp_path, ValueError, "2 safetensors files.*name one file")


def test_a_full_disk(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    refused(recipe, tmp_path, OSError, "needs .* GB .* 0.00 GB are free")


def test_output_in_the_way(recipe, tmp_path):
    (tmp_path / "out").write_text("a file")
    refused(recipe, tmp_path, ValueError, "is a file; name a folder")
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(recipe, tmp_path, ValueError, "already holds notes.txt; name another folder", overwrite=True)


def test_options(recipe, tmp_path):
    refused(recipe, tmp_path, ValueError, "out_dtype='int8' is unknown", out_dtype="int8")
    refused(recipe, tmp_path, ValueError, "max_shard_size='5 apples'", max_shard_size="5 apples")
    refused(recipe, tmp_path, ValueError, "threads=0", threads=0)
    refused(recipe, tmp_path, ValueError, "device='quantum'", device="quantum")
