from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_atm import MultiTaskModel
from hf_atm.cli.main import main

from .conftest import training


def fails(arguments, capsys, message, code=2):
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    return error


@pytest.fixture
def split_tasks():
    return {
        "tone": {"dataset": "tone", "test_split": "test"},
        "likeness": {"dataset": "likeness", "test_split": "test", "metrics": ["spearmanr", "mse"]},
    }


def test_train_leaves_a_whole_result(config, tmp_path, split_tasks, capsys):
    path = config(tasks=split_tasks, export_tasks=True)
    assert main(["train", str(path), "--eval_experts", "true"]) == 0
    output = capsys.readouterr().out
    assert "2 tasks (likeness 32, tone 32 examples), 2 rounds of 8 steps" in output
    assert "merged, round 2" in output
    assert "its experts" in output
    assert "test split" in output
    run = tmp_path / "run"
    report = json.loads((run / "atm_report.json").read_text())
    assert len(report["rounds"]) == 2
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert {"test_tone_accuracy", "test_likeness_spearmanr", "test_likeness_mse", "test_average"} <= set(metrics)

    merged = MultiTaskModel.from_pretrained(run).eval()
    batch = AutoTokenizer.from_pretrained(run)(["good film", "bad"], padding=True, return_tensors="pt")
    for task in ("tone", "likeness"):
        stock = AutoModelForSequenceClassification.from_pretrained(run / "tasks" / task).eval()
        assert AutoTokenizer.from_pretrained(run / "tasks" / task)("good")["input_ids"] == [1, 4, 2]
        torch.testing.assert_close(stock(**batch).logits, merged(**batch, task=task).logits)
    assert stock.config.problem_type == "regression"

    assert main(["evaluate", str(run), str(path), "--split", "test", "--output", str(tmp_path / "m.json")]) == 0
    again = json.loads((tmp_path / "m.json").read_text())
    assert again["test_tone_accuracy"] == metrics["test_tone_accuracy"]
    assert again["test_likeness_mse"] == pytest.approx(metrics["test_likeness_mse"], rel=1e-5)
    assert "metrics: likeness spearmanr, tone accuracy" in capsys.readouterr().out

    stock_run = str(run / "tasks" / "likeness")
    one = ["evaluate", stock_run, str(path), "--split", "test", "--tasks", "likeness", "--output", str(tmp_path / "s")]
    assert main(one) == 0
    alone = json.loads((tmp_path / "s").read_text())
    assert alone["test_likeness_mse"] == pytest.approx(metrics["test_likeness_mse"], rel=1e-5)
    assert main(["evaluate", str(run), str(path), "--tasks", "tone"]) == 0
    fails(["evaluate", stock_run, path], capsys, "is a single-task model; name its task with --tasks")
    fails(["evaluate", run, path, "--tasks", "mood"], capsys, "unknown task 'mood'; the tasks of")


def test_train_is_quiet(config, capsys):
    assert main(["train", str(config()), "--quiet"]) == 0
    output = capsys.readouterr()
    assert "Round" not in output.out
    assert "tasks (" not in output.out
    assert "The merged model is in" in output.out
    assert "{'loss'" not in output.out + output.err


def test_resuming_gives_the_uninterrupted_run(config, tmp_path, capsys):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    steps = ["--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "2"]
    path = str(config())
    assert main(["train", path, "--output_dir", whole, *steps]) == 0
    assert main(["train", path, "--output_dir", cut, *steps]) == 0
    fails(["train", path, "--output_dir", cut], capsys, "holds another run")
    for file in (tmp_path / "cut").glob("model.safetensors"):
        file.unlink()
    (tmp_path / "cut" / "checkpoint-16").rename(tmp_path / "away")
    assert main(["train", path, "--output_dir", cut, *steps, "--resume_from_checkpoint", "true"]) == 0
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_divergence_saves_the_last_good_model(config, tmp_path, capsys):
    error = fails(["train", config(), "--learning_rate", "1e30", "--quiet"], capsys, "NaN or infin", code=1)
    assert "lower learning_rate" in error
    assert f"It is saved in {tmp_path / 'run'}" in error
    state = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_lora(config, tmp_path, encoder):
    model = {"backbone": "encoder", "peft": {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}}
    assert main(["train", str(config(model=model, export_tasks=True)), "--quiet"]) == 0
    run = tmp_path / "run"
    assert (run / "adapters" / "tone" / "adapter_config.json").is_file()
    merged = MultiTaskModel.from_pretrained(run).eval()
    stock = AutoModelForSequenceClassification.from_pretrained(run / "tasks" / "tone").eval()
    batch = AutoTokenizer.from_pretrained(run)(["good film"], return_tensors="pt")
    torch.testing.assert_close(stock(**batch).logits, merged(**batch, task="tone").logits)


def test_causal_lm(config, tmp_path, decoder, text_data, capsys):
    tasks = {
        "tone": {"dataset": "tone", "text_columns": "text"},
        "likeness": {"dataset": "likeness", "text_columns": ["a"]},
    }
    path = config(model={"causal_lm": "decoder"}, task_defaults={"max_length": 8}, tasks=tasks)
    assert main(["train", str(path)]) == 0
    assert "token_accuracy" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), str(path), "--output", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["eval_tone_perplexity"] > 1
    fails(["train", config(model={"causal_lm": "decoder"}, export_tasks=True)], capsys, "one stock model already")


def test_images(config, tmp_path, image_data):
    vit = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
    path = config(
        model={"config": {**vit, "num_attention_heads": 2, "intermediate_size": 16}},
        tasks={name: {"dataset": name} for name in ("grey", "colour")},
        export_tasks=True,
    )
    assert main(["train", str(path), "--quiet"]) == 0
    run = tmp_path / "run"
    processor = AutoImageProcessor.from_pretrained(run / "tasks" / "grey")
    assert processor.size["height"] == 8
    assert AutoModelForImageClassification.from_pretrained(run / "tasks" / "grey").config.label2id == {"x": 0, "y": 1}
    assert main(["evaluate", str(run / "tasks" / "grey"), str(path), "--tasks", "grey"]) == 0
    assert main(["evaluate", str(run), str(path)]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"tone": {"dataset": "nowhere"}}}, "task 'tone': data set 'nowhere' was not found"),
        ({"tasks": {"tone": {"dataset": "tone", "metrics": "accurcy"}}}, "unknown metric 'accurcy'; known"),
        ({"tasks": {"tone": {"dataset": "tone", "label_column": "y"}}}, "its columns are text, label"),
        ({"tasks": {"tone": {"dataset": "tone", "train_split": None}}}, "task 'tone' has no train_split"),
        ({"tasks": {"a.b": {"dataset": "tone"}}}, "a.b"),
        ({"model": {"backbone": "encoder", "pooling": "mean"}, "export_tasks": True}, "family's own pooling"),
        ({"model": {"config": {"model_type": "vit"}}}, "text tasks need model.backbone"),
        (
            {"model": {"backbone": "somebody/no-such-model"}},
            "'somebody/no-such-model' was not found as a folder or on the Hub",
        ),
    ],
)
def test_bad_input_ends_in_one_sentence(config, capsys, changes, message):
    fails(["train", config(**changes), "--quiet"], capsys, message)


def test_mixed_data(config, capsys, image_data):
    tasks = {"tone": {"dataset": "tone"}, "grey": {"dataset": "grey"}}
    fails(["train", config(tasks=tasks)], capsys, "the tasks mix image and text data")


def test_evaluate_refuses(config, capsys, encoder):
    path = config()
    fails(["evaluate", "./nowhere", path], capsys, "model './nowhere' is not a folder")
    fails(["evaluate", encoder, path, "--split", "test", "--tasks", "tone"], capsys, "has no test_split")


def test_one_yaml_serves_both_commands(config):
    content = yaml.safe_load(config().read_text())
    assert content["training"] == training(config().parent)
