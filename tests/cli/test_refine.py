"""`hf-atm refine` on saved models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertModel, LlamaForCausalLM

from hf_atm import MultiTaskModel
from hf_atm.cli.main import main

from .conftest import training
from .test_commands import fails


TASKS = {
    "tone": {"dataset": "tone", "test_split": "test"},
    "likeness": {"dataset": "likeness", "test_split": "test", "metrics": ["spearmanr"]},
}
SETTINGS = ["--num_rounds", "2", "--local_steps", "2", "--per_device_train_batch_size", "4"]


@pytest.fixture
def merged(config, tmp_path):
    """A model of one round, with its stock models, and the file that made it."""
    path = config(tasks=TASKS, export_tasks=True, training=training(tmp_path, num_rounds=1, merge_method="tsv_m"))
    assert main(["train", str(path), "--quiet"]) == 0
    return tmp_path / "run", path


def test_refine_leaves_a_better_or_equal_model(merged, tmp_path, capsys):
    model, path = merged
    output = tmp_path / "refined"
    assert main(["refine", str(model), str(path), "--output_dir", str(output), *SETTINGS]) == 0
    shown = capsys.readouterr().out
    assert "before" in shown and f"The refined model is in {output}" in shown
    facts = json.loads((output / "refine.json").read_text())
    assert facts["best"] >= facts["start"]["eval_average"] and len(facts["rounds"]) == 2
    assert facts["tuned_on"] == {"tone": 6, "likeness": 6}
    assert "test_tone_accuracy" in facts["test"]
    assert (output / "tasks" / "tone" / "config.json").is_file()
    assert set(MultiTaskModel.from_pretrained(output).heads) == set(TASKS)


def test_a_divergence_leaves_the_start(merged, tmp_path, capsys):
    model, path = merged
    output = tmp_path / "refined"
    arguments = [*SETTINGS, "--learning_rate", "1e30", "--output_dir", str(output)]
    assert main(["refine", str(model), str(path), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Tuning ended early" in shown and "No round was better than the start" in shown
    facts = json.loads((output / "refine.json").read_text())
    assert facts["best_round"] == 0 and "lower learning_rate" in facts["stopped"]
    kept, start = (load_file(folder / "model.safetensors") for folder in (output, model))
    assert all(torch.equal(kept[name], start[name]) for name in start)


def test_on_a_tenth_of_the_training_data(merged, tmp_path):
    model, path = merged
    output = tmp_path / "refined"
    arguments = ["--data", "train", "--share", "0.25", "--output_dir", str(output), *SETTINGS]
    assert main(["refine", str(model), str(path), *arguments]) == 0
    facts = json.loads((output / "refine.json").read_text())
    assert facts["tuned_on"] == {"tone": 8, "likeness": 8}


def test_a_merged_backbone_takes_the_experts_heads(merged, tmp_path):
    model, path = merged
    BertModel.from_pretrained(model / "tasks" / "tone").save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "backbone" / "tokenizer_config.json").write_bytes((model / "tokenizer_config.json").read_bytes())
    output = tmp_path / "refined"
    heads = [f"{task}={model / 'tasks' / task}" for task in TASKS]
    rest = ["--output_dir", str(output), *SETTINGS, "--learning_rate", "0.0"]
    assert main(["refine", str(tmp_path / "backbone"), str(path), "--heads", *heads, *rest]) == 0
    refined = MultiTaskModel.from_pretrained(output).eval()
    ids = torch.tensor([[1, 4, 5, 2]])
    for task in TASKS:
        stock = AutoModelForSequenceClassification.from_pretrained(model / "tasks" / task).eval()
        torch.testing.assert_close(refined(input_ids=ids, task=task).logits, stock(input_ids=ids).logits)


def test_a_causal_language_model(config, decoder, tmp_path):
    tasks = {
        name: {"dataset": name, "text_columns": column, "max_length": 4}
        for name, column in (("tone", "text"), ("likeness", "a"))
    }
    path = config(model={"causal_lm": "decoder"}, tasks=tasks)
    output = tmp_path / "refined"
    assert main(["refine", str(decoder), str(path), "--output_dir", str(output), "--holdout", "0.5", *SETTINGS]) == 0
    facts = json.loads((output / "refine.json").read_text())
    assert facts["metric"] == "eval_average"
    LlamaForCausalLM.from_pretrained(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "0"], "share is 0.0"),
        (["--holdout", "0"], "--holdout must be above 0"),
        (["--share", "0.1"], "has 8 examples, too few for share=0.1"),
        (["--heads", "tone"], "--heads takes TASK=MODEL, not 'tone'"),
        (["--heads", "mood=x"], "--heads names the unknown task 'mood'; the tasks are"),
        (["--num_round", "3"], "unknown setting '--num_round'; did you mean 'num_rounds'"),
    ],
)
def test_bad_input(merged, tmp_path, capsys, arguments, message):
    model, path = merged
    fails(["refine", model, path, "--output_dir", tmp_path / "refined", *arguments], capsys, message)
    assert not (tmp_path / "refined").exists()


def test_a_head_of_another_size(merged, tmp_path, capsys):
    model, path = merged
    arguments = ["--output_dir", tmp_path / "refined", "--heads", f"likeness={model / 'tasks' / 'tone'}"]
    fails(["refine", model, path, *arguments], capsys, "does not fit task 'likeness': classifier.weight is (2, 16)")


def test_a_task_without_validation_data(merged, tmp_path, capsys):
    model, path = merged
    path.write_text(path.read_text().replace("dataset: tone", "dataset: tone\n    eval_split: null"))
    fails(["refine", model, path], capsys, "task 'tone' has no eval_split")
