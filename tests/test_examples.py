"""The example scripts run as a user runs them, on small local data; the configurations are valid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from hf_atm import MultiTaskModel


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BENCHMARKS = EXAMPLES.with_name("benchmarks")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "day", "night"]
COMMON = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--num_rounds", "1", "--local_steps", "2"]


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments), *COMMON]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def text_model(folder, model):
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "words.txt"), eos_token="[SEP]").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("extra", [["--export_tasks"], ["--lora_rank", "2"]], ids=["full weights", "LoRA"])
def test_glue_from_local_folders(tmp_path, extra):
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = text_model(tmp_path / "bert", BertModel(config))
    for task, labels in (("sst2", [0, 1]), ("stsb", [0.5, 2.5])):
        rows = {"sentence": ["a good film", "a bad day"] * 16, "label": labels * 16}
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / task / f"{split}.parquet")
    output = tmp_path / "out"
    run(
        "run_glue_atm.py",
        *("--model_name_or_path", model, "--data_folder", tmp_path / "data", "--task_names", "sst2", "stsb"),
        *("--output_dir", output, *extra),
    )
    metrics = json.loads((output / "eval_results.json").read_text())
    assert {"eval_sst2_accuracy", "eval_stsb_pearsonr", "eval_average"} <= set(metrics)
    assert set(MultiTaskModel.from_pretrained(output).config.tasks) == {"sst2", "stsb"}
    if "--export_tasks" in extra:
        stock = AutoModelForSequenceClassification.from_pretrained(output / "tasks" / "stsb")
        assert stock.config.problem_type == "regression"


def test_vision_from_local_folders(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    for task in ("one", "two"):
        (tmp_path / task).mkdir()
        split = datasets.Dataset.from_dict({"image": list(images), "label": [0, 1] * 8}, features=features)
        for name in ("train", "validation"):
            split.to_parquet(tmp_path / task / f"{name}.parquet")
    run(
        "run_vision_atm.py",
        *("--model_name_or_path", tmp_path / "vit", "--image_size", 8),
        *("--datasets", tmp_path / "one", tmp_path / "two", "--output_dir", tmp_path / "out"),
    )
    assert "eval_two_accuracy" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_lora_over_sft(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = text_model(tmp_path / "llama", LlamaForCausalLM(config))
    for task, text in (("films", "a good film"), ("days", "a bad day")):
        (tmp_path / f"{task}.txt").write_text("\n".join([text] * 40))
    run(
        "run_lora_sft_atm.py",
        *("--model_name_or_path", model, "--output_dir", tmp_path / "out", "--bf16", "false", "--lora_rank", 2),
        *("--train_files", f"films={tmp_path / 'films.txt'}", f"days={tmp_path / 'days.txt'}"),
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "adapters").iterdir()) == ["days", "films"]


@pytest.mark.parametrize("config", sorted(path.name for path in (EXAMPLES / "configs").glob("*.yaml")))
def test_configurations_are_valid(config, monkeypatch, tmp_path):
    from hf_atm.cli import experiment

    # Folders that only some machines have count as present: what is checked is the file.
    monkeypatch.setattr(experiment, "resolve_reference", lambda reference, folder: reference)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    parsed = experiment.read_experiment(EXAMPLES / "configs" / config)
    assert len(parsed.tasks) >= 4 and parsed.args.num_rounds >= 6


@pytest.mark.parametrize("config", sorted(path.name for path in (EXAMPLES / "fewshot").glob("*.yaml")))
def test_few_shot_configurations_are_valid(config, monkeypatch):
    from hf_atm.cli import fewshot

    monkeypatch.setattr(fewshot, "resolve_reference", lambda reference, folder: reference)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    parsed = fewshot.read_few_shot(EXAMPLES / "fewshot" / config)
    assert parsed.args.n_way >= 2 and parsed.test_episodes >= 1000 and parsed.baselines


@pytest.mark.parametrize("config", sorted(path.name for path in (BENCHMARKS / "quality").glob("*.yaml")))
def test_benchmarks_compare_at_equal_budgets(config, monkeypatch):
    from hf_atm.baselines.members import check_budgets
    from hf_atm.cli import experiment
    from hf_atm.cli.compare import choose_members

    monkeypatch.setattr(experiment, "resolve_reference", lambda reference, folder: reference)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    parsed = experiment.read_experiment(BENCHMARKS / "quality" / config)
    assert parsed.compare["seeds"] == [0, 1, 2]
    members = choose_members(parsed, None)
    settings = check_budgets(members, list(parsed.tasks), vars(parsed.args), parsed.compare["steps"])
    rounds = [settings[member.name].get("num_rounds", parsed.args.num_rounds) for member in members]
    assert {10, 5, 2, 1} <= set(rounds) and {"joint", "recommended", "one_shot"} <= set(settings)


def test_the_table_lists_every_example():
    text = (EXAMPLES / "README.md").read_text()
    scripts = [path for path in EXAMPLES.glob("**/*.py") if "__main__" in path.read_text()]
    for path in [*scripts, *EXAMPLES.glob("configs/*.yaml"), *EXAMPLES.glob("fewshot/*.yaml")]:
        assert path.name in text, path.name
