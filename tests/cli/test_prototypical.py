from __future__ import annotations

import json

import pytest
import torch

from hf_atm import MultiTaskModel
from hf_atm.cli.main import main

from .conftest import training
from .test_commands import fails


EPISODES = {"head": "prototypical", "k_shot": 2, "n_query": 1}


@pytest.fixture
def tasks():
    return {
        "tone": {"dataset": "tone", "test_split": "test", "max_train_per_class": 5, **EPISODES},
        "likeness": {"dataset": "likeness", "test_split": "test"},
    }


def test_train_and_evaluate(config, tmp_path, tasks, capsys):
    path = config(tasks=tasks, training=training(tmp_path, local_steps=2, head_steps=1))
    assert main(["train", str(path)]) == 0
    assert "tone 10 examples" in capsys.readouterr().out
    run = tmp_path / "run"
    before = MultiTaskModel.from_pretrained(run)
    assert before.config.tasks["tone"]["n_way"] == 2 and before.heads["tone"].prototypes.abs().sum() > 0
    trained = json.loads((run / "test_metrics.json").read_text())["test_tone_accuracy"]
    # Scored as it is: prototypes are those of the training data, not of the test split.
    scores = tmp_path / "scores.json"
    assert main(["evaluate", str(run), str(path), "--split", "test", "--output", str(scores)]) == 0
    assert json.loads(scores.read_text())["test_tone_accuracy"] == pytest.approx(trained)
    assert torch.equal(before.heads["tone"].prototypes, MultiTaskModel.from_pretrained(run).heads["tone"].prototypes)


def test_evaluate_learns_nothing_from_what_it_scores(config, tmp_path, tasks, encoder, capsys):
    heads = {"tone": {"num_labels": 2, **EPISODES}, "likeness": {"num_labels": 1}}
    MultiTaskModel.from_backbone(str(encoder), tasks=heads).save_pretrained(tmp_path / "new")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "new" / name).write_bytes((encoder / name).read_bytes())
    assert main(["evaluate", str(tmp_path / "new"), str(config(tasks=tasks))]) == 2
    assert "no prototypes yet" in capsys.readouterr().err


def test_compare(config, tmp_path, tasks):
    path = config(
        tasks=tasks,
        training=training(tmp_path),
        compare={"members": {"joint": {}, "one_shot": {"merges": ["mean"]}, "recommended": {}}, "steps": 10},
    )
    assert main(["compare", str(path), "--quiet"]) == 0
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())["rows"]
    assert {"joint", "experts", "one-shot mean tuned", "recommended"} <= set(rows)
    assert all(not row["failed"] and "tone" in row["test"]["tasks"] for row in rows.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_shot": 5}, "class 'n' has 5 samples, and an episode takes 5 + 1"),
        ({"n_way": 3}, "n_way is 3, but there are 2 classes"),
        ({"head": None}, "k_shot belongs to episodes; add head: prototypical"),
        ({"dataset": "likeness", "max_train_per_class": None}, "the task is a regression"),
        ({"n_query": 0}, "n_query must be a whole number from 1"),
    ],
)
def test_bad_input_ends_in_one_sentence(config, tasks, capsys, changes, message):
    tasks["tone"] |= changes
    fails(["train", config(tasks=tasks)], capsys, message)


def test_exports_are_refused_before_training(config, tasks, capsys):
    fails(["train", config(tasks=tasks, export_tasks=True)], capsys, "task 'tone' has head: prototypical")
