"""Cards of real runs: their numbers are those of the reports, their code runs, their metadata survive a round trip."""

from __future__ import annotations

import json
import re

import torch
from huggingface_hub import ModelCard

from hf_atm.cli.card import read_levels
from hf_atm.cli.main import main


SPLITS = {
    "tone": {"dataset": "tone", "test_split": "test"},
    "likeness": {"dataset": "likeness", "metrics": ["spearmanr", "mse"], "test_split": "test"},
}


def train(config, tmp_path, *arguments, **changes):
    assert main(["train", str(config(**changes)), "--eval_strategy", "epoch", "--quiet", *arguments]) == 0
    return tmp_path / "run"


def read(run):
    text = (run / "README.md").read_text(encoding="utf-8")
    assert "Traceback" not in text and "{{ " not in text and "None" not in text
    return text, ModelCard.load(run / "README.md").data.to_dict()


def run_code(text, run, monkeypatch):
    """The card's Python blocks, with the repository's name standing for the folder."""
    monkeypatch.chdir(run.parent)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        scope = {}
        exec(compile(block, "card", "exec"), scope)
        assert isinstance(scope["model"], torch.nn.Module)


def test_full_weights(config, tmp_path, monkeypatch, capsys):
    run = train(config, tmp_path, "--eval_experts", "true", "--diagnostics", "full", tasks=SPLITS, export_tasks=True)
    levels = tmp_path / "levels.json"
    levels.write_text(json.dumps({"joint training": {"tone": 0.75, "likeness": 0.25}}))
    capsys.readouterr()
    assert main(["card", str(run), "--license", "apache-2.0", "--language", "en", "--levels", str(levels)]) == 0
    text, data = read(run)
    report = json.loads((run / "atm_report.json").read_text())
    test = json.loads((run / "test_metrics.json").read_text())
    last = report["rounds"][-1]
    for task, metric in (("tone", "accuracy"), ("likeness", "spearmanr")):
        scores = (test[f"test_{task}_{metric}"], last["scores"][task], last["expert_scores"][task])
        cells = " | ".join(f"{score:.3f}" for score in scores)
        assert f"| {task} | {metric} | {cells} | {0.75 if task == 'tone' else 0.25:.3f} |" in text
    # A folder is no address on the Hub.
    assert data["library_name"] == "transformers" and "base_model" not in data and "`encoder`" in text
    assert data["license"] == "apache-2.0"
    assert data["metrics"] == ["accuracy", "spearmanr"] and {"atm", "model-merging"} <= set(data["tags"])
    results = {entry["dataset"]["name"]: entry for entry in data["model-index"][0]["results"]}
    assert results["tone"]["metrics"][0]["value"] == round(test["test_tone_accuracy"], 4)
    assert results["tone"]["dataset"]["split"] == "test" and results["tone"]["task"]["type"] == "text-classification"
    for name in ("rounds", "scores", "cosines", "interference"):
        assert f"(figures/{name}.png)" in text and (run / "figures" / f"{name}.svg").is_file()
    for file in ("model.safetensors", "tasks/tone/model.safetensors"):
        assert re.search(rf"`{file}` \| `[0-9a-f]{{64}}`", text)
    assert "`learning_rate`" in text and "2411.03055" in text and str(tmp_path) not in text
    run_code(text, run, monkeypatch)
    # Written again, it is the same.
    assert (
        main(["card", str(run), "--license", "apache-2.0", "--language", "en", "--levels", str(levels), "--quiet"])
        == 0
    )
    assert read(run)[0] == text


def test_a_model_without_exports_or_evaluation(config, tmp_path, monkeypatch):
    run = train(config, tmp_path, "--eval_strategy", "no")
    report = json.loads((run / "atm_report.json").read_text())
    report["run"]["model"] |= {"base_model": "org/encoder", "is_local": False}
    report["run"]["datasets"] = {"tone": "org/tones"}
    (run / "atm_report.json").write_text(json.dumps(report))
    assert main(["card", str(run), "--quiet"]) == 0
    text, data = read(run)
    assert data["base_model"] == "org/encoder" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["org/tones"]
    assert "The run was not evaluated." in text and "model-index" not in data
    assert not (run / "figures" / "rounds.png").exists()
    run_code(text, run, monkeypatch)


def test_an_adapter(config, tmp_path):
    model = {"backbone": "encoder", "peft": {"r": 2, "target_modules": ["query", "value"]}}
    run = train(config, tmp_path, "--lora_merge_mode", "svd", model=model)
    assert main(["card", str(run), "--name", "Two tasks", "--repository", "me/two", "--quiet"]) == 0
    text, data = read(run)
    assert data["library_name"] == "peft" and "`encoder`" in text
    assert "# Two tasks" in text and 'from_pretrained("me/two")' in text


def test_a_language_model(config, tmp_path, decoder, monkeypatch):
    tasks = {
        "tone": {"dataset": "tone", "text_columns": "text"},
        "likeness": {"dataset": "likeness", "text_columns": ["a"]},
    }
    run = train(config, tmp_path, model={"causal_lm": "decoder"}, task_defaults={"max_length": 8}, tasks=tasks)
    assert main(["card", str(run), "--quiet"]) == 0
    text, data = read(run)
    assert data["model-index"][0]["results"][0]["task"]["type"] == "text-generation"
    run_code(text, run, monkeypatch)


def test_the_best_round_is_the_cards(config, tmp_path):
    arguments = (
        "--load_best_model_at_end",
        "true",
        "--save_strategy",
        "epoch",
        "--metric_for_best_model",
        "eval_loss",
    )
    run = train(config, tmp_path, *arguments, "--learning_rate", "10", "--num_rounds", "3")
    report = json.loads((run / "atm_report.json").read_text())
    kept = min(report["rounds"], key=lambda record: record["metrics"]["eval_loss"])
    assert kept["round"] < 2, "the last round was the best, so that this test shows nothing"
    assert main(["card", str(run), "--quiet"]) == 0
    assert f"| tone | accuracy | {kept['scores']['tone']:.3f} |" in read(run)[0]


def test_bad_input(config, tmp_path, capsys):
    run = train(config, tmp_path)
    levels = tmp_path / "levels.json"
    levels.write_text("[1]")
    report = json.loads((run / "atm_report.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    (old / "atm_report.json").write_text(json.dumps({"rounds": report["rounds"]}))
    unsaved = tmp_path / "unsaved"
    unsaved.mkdir()
    (unsaved / "atm_report.json").write_text(json.dumps(report))
    capsys.readouterr()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "name the output_dir of a run"),
        ([str(tmp_path)], "holds no atm_report.json; it is no output_dir of a run"),
        ([str(old)], "run the training again"),
        ([str(unsaved)], "call trainer.save_model() first"),
        ([str(run), "--levels", str(levels)], "must hold {name: {task: score}}"),
    ):
        assert main(["card", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (old / "README.md").exists()


def test_levels_of_a_comparison(tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"rows": {"joint": {"validation": {"tasks": {"a": 0.5}}}, "failed": {}}}))
    assert read_levels(path) == {"joint": {"a": 0.5}}
