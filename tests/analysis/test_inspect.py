"""Task vectors of models on disk, and the command that prints what they are like."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from hf_atm.analysis import diagnose
from hf_atm.analysis.checkpoints import distinct_names, open_task_vectors
from hf_atm.cli.main import main
from hf_atm.hub import push


CONFIG = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


@pytest.fixture
def models(tmp_path):
    """A base, and two models tuned from it with heads of different sizes."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**CONFIG))
    base.save_pretrained(tmp_path / "base")
    for name, labels in (("sst2", 2), ("trec", 6)):
        model = BertModel.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        state = {**model.state_dict(), "classifier.weight": torch.randn(labels, 16)}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return tmp_path


def test_differences_of_what_all_have(models):
    vectors, skipped = open_task_vectors(str(models / "base"), [str(models / "sst2"), str(models / "trec")])
    base = BertModel.from_pretrained(models / "base").state_dict()
    tuned = {task: load_file(models / task / "model.safetensors") for task in ("sst2", "trec")}
    assert sorted(vectors) == ["sst2", "trec"] and skipped == ["classifier.weight"]
    assert set(vectors["sst2"]) == set(base)
    for task in vectors:
        for name in base:
            assert torch.equal(vectors[task][name], tuned[task][name] - base[name])
    expected = diagnose({task: {name: state[name] - base[name] for name in base} for task, state in tuned.items()})
    assert diagnose(vectors).to_dict() == expected.to_dict()


def test_names_and_exclude(models):
    paths = [str(models / "sst2"), str(models / "trec")]
    vectors, skipped = open_task_vectors(str(models / "base"), paths, ["a", "b"], ["*embeddings*"])
    assert sorted(vectors) == ["a", "b"] and not any("embeddings" in name for name in vectors["a"])
    assert "embeddings.word_embeddings.weight" in skipped
    assert distinct_names(["runs/a/model", "runs/b/model/"]) == ["a/model", "b/model"]


def test_adapters_stand_for_their_updates(models):
    updates = {}
    for name in ("x", "y"):
        model = get_peft_model(
            BertModel.from_pretrained(models / "base"),
            LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False),
        )
        model.save_pretrained(models / name)
        layer = model.base_model.model.encoder.layer[0].attention.self.query
        updates[name] = 3 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    vectors, skipped = open_task_vectors("not/read", [str(models / "x"), str(models / "y")])
    assert skipped == []
    key = "encoder.layer.0.attention.self.query.weight"
    for name in ("x", "y"):
        assert torch.allclose(vectors[name][key], updates[name], atol=1e-6)
    assert diagnose(vectors).effective_rank <= 4 + 1e-6
    assert diagnose(vectors, threads=2).to_dict() == diagnose(vectors).to_dict()


def test_the_command(models, capsys):
    output = models / "inspection.json"
    paths = [str(models / name) for name in ("base", "sst2", "trec")]
    assert main(["inspect", *paths, "--output", str(output), "--quiet"]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(output.read_text())
    assert f"{stored['cosines']['sst2']['trec']:.4f}" in printed and f"{stored['interference']:.4g}" in printed
    assert "classifier.weight" in printed and stored["skipped"] == ["classifier.weight"]
    assert stored["layers"]["encoder.layer.0.attention.self.query.weight"]["interference"] > 0
    assert main(["inspect", *paths, "--level", "cheap", "--quiet"]) == 0
    assert "interference" not in capsys.readouterr().out


def test_bad_input(models, capsys):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)).save_pretrained(
        models / "other"
    )
    get_peft_model(BertModel.from_pretrained(models / "base"), LoraConfig(target_modules=["query"])).save_pretrained(
        models / "adapter"
    )
    capsys.readouterr()
    base, sst2 = str(models / "base"), str(models / "sst2")
    for arguments, message in (
        ([base, str(models / "other")], "architecture"),
        ([base, sst2, sst2], "given twice"),
        ([base, sst2, str(models / "adapter")], "compare like with like"),
        ([base, str(models / "missing")], "missing"),
        ([base, sst2, "--names", "a", "b"], "different names"),
        ([base, sst2, "--output", str(models / "no" / "where.json")], "make it first"),
        ([base, sst2, "--exclude", "*"], "exclude leaves nothing"),
    ):
        assert main(["inspect", *arguments, "--quiet"]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_adapters_and_checkpoints_on_the_hub(models, hub):
    folder = models / "adapter"
    model = get_peft_model(BertModel.from_pretrained(models / "base"), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(folder)
    (models / "sst2" / "config.json").write_text("{}")
    push(folder, "me/adapter")
    push(models / "sst2", "me/sst2")
    local, _ = open_task_vectors("not/read", [str(folder)], ["t"])
    fetched, _ = open_task_vectors("not/read", ["me/adapter"], ["t"])
    assert local["t"].keys() == fetched["t"].keys() and len(local["t"]) == 1
    whole, _ = open_task_vectors(str(models / "base"), ["me/sst2"])
    here, _ = open_task_vectors(str(models / "base"), [str(models / "sst2")])
    key = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(whole["sst2"][key], here["sst2"][key])
    with pytest.raises(FileNotFoundError, match="'me/none' is not a folder here and could not be fetched"):
        open_task_vectors(str(models / "base"), ["me/none"])
