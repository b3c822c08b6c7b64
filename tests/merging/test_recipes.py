from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from hf_atm.cli.main import main
from hf_atm.merging.recipes import merge_recipe

from .checkpoints.testing_utils import load_checkpoint, write_models


def build():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


@pytest.fixture
def adapters(tmp_path):
    for index in range(2):
        model = get_peft_model(build(), LoraConfig(r=2 + index, lora_alpha=4, target_modules=["query", "value"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / f"a{index}")
    models = [{"model": str(tmp_path / f"a{index}"), "parameters": {"weight": index + 1}} for index in range(2)]
    return {"merge_method": "task_arithmetic", "models": models}


def updated(folder):
    model = PeftModel.from_pretrained(build(), folder).merge_and_unload()
    return (
        model.state_dict()["encoder.layer.0.attention.self.query.weight"]
        - build().state_dict()["encoder.layer.0.attention.self.query.weight"]
    )


def test_adapters_by_recipe(adapters, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps(adapters))
    assert main(["merge", str(tmp_path / "recipe.json"), str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    expected = updated(tmp_path / "a0") + 2 * updated(tmp_path / "a1")
    torch.testing.assert_close(updated(tmp_path / "out"), expected, rtol=0, atol=1e-5)
    short = {**adapters, "adapters": {"output": "svd", "svd_rank": 1}}
    merge_recipe(short, tmp_path / "short")
    assert torch.linalg.matrix_rank(updated(tmp_path / "short"), atol=1e-4) == 1


def test_a_dry_run_of_adapters_writes_nothing(adapters, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps(adapters))
    assert main(["merge", str(tmp_path / "recipe.json"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_adapters_and_checkpoints_do_not_mix(adapters, tmp_path):
    recipe = write_models(tmp_path)
    mixed = {"models": [*adapters["models"], *recipe["models"]]}
    with pytest.raises(ValueError, match="a0, a1: adapters, beside whole checkpoints"):
        merge_recipe(mixed, tmp_path / "out")
    with pytest.raises(ValueError, match="'adapters' is for adapters"):
        merge_recipe({**recipe, "adapters": {"output": "svd"}}, tmp_path / "out")
    with pytest.raises(ValueError, match="outptu"):
        merge_recipe({**adapters, "adapters": {"outptu": "svd"}}, tmp_path / "out")
    with pytest.raises(ValueError, match="'exclude' has no meaning for adapters"):
        merge_recipe({**adapters, "exclude": ["a"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_and_earlier_results(adapters, tmp_path):
    merge_recipe({**adapters, "out_dtype": "float64"}, tmp_path / "out")
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / "out").values()} == {torch.float64}
    with pytest.raises(ValueError, match="overwrite=True"):
        merge_recipe(adapters, tmp_path / "out")
    merge_recipe(adapters, tmp_path / "out", overwrite=True)
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / "out").values()} == {torch.float32}


def test_keys_and_options_of_adapter_recipes_count_or_are_refused(adapters, tmp_path):
    half = merge_recipe(adapters, tmp_path / "half", out_dtype="bfloat16")
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    for option in ({"device": "cuda"}, {"threads": 3}, {"max_shard_size": "1GB"}):
        with pytest.raises(ValueError, match="has no meaning for adapters"):
            merge_recipe(adapters, tmp_path / "out", **option)
    for key in ({"buffers": "base"}, {"vocab_policy": "common"}, {"base_model": "b", "tokenizer_source": "a0"}):
        with pytest.raises(ValueError, match="has no meaning for adapters"):
            merge_recipe({**adapters, **key}, tmp_path / "out")
    for name in ("a0", "a1"):
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": f"base of {name}"}))
    with pytest.raises(ValueError, match="base model"):
        merge_recipe(adapters, tmp_path / "out")
    with pytest.warns(UserWarning, match="base model"):
        merge_recipe({**adapters, "strict": False}, tmp_path / "out")


def test_names_of_separate_heads_are_looked_at_before_the_merge(adapters, tmp_path):
    adapters["models"][0]["name"] = "me/adapter"
    with pytest.raises(ValueError, match="'me/adapter'.*no folder names"):
        merge_recipe({**adapters, "adapters": {"heads": "separate"}}, tmp_path / "out", dry_run=True)
