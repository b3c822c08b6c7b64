"""`hf-atm compare` on files."""

from __future__ import annotations

import json

import pytest

from hf_atm.cli.main import main

from .conftest import training
from .test_commands import fails


MEMBERS = {
    "pretrained": {},
    "one_shot": {"merges": ["ties"]},
    "joint": {"learning_rate": "2e-3"},
    "cold_fusion": {},
    "atm": {},
}


@pytest.fixture
def compared(config, tmp_path):
    def write(members=MEMBERS, training_changes=None, **comparison):
        return config(
            compare={"members": members, "seeds": [0], "steps": 4} | comparison,
            training=training(tmp_path, local_steps=2, **(training_changes or {})),
            tasks={
                "tone": {"dataset": "tone", "test_split": "test"},
                "likeness": {"dataset": "likeness", "test_split": "test", "metrics": ["spearmanr"]},
            },
        )

    return write


def test_compare_leaves_table_figure_and_json(compared, tmp_path, capsys):
    assert main(["compare", str(compared()), "--seeds", "0", "1"]) == 0
    output = capsys.readouterr().out
    assert "joint, seed 1:" in output and "## Test" in output and "| one-shot ties tuned |" in output
    result = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert result["seeds"] == [0, 1] and result["steps"] == 4
    assert result["cells"]["0"]["joint"]["settings"]["learning_rate"] == 2e-3
    names = {"pretrained", "experts", "one-shot ties untuned", "one-shot ties tuned", "joint", "cold_fusion", "atm"}
    assert set(result["rows"]) == names
    assert (tmp_path / "run" / "comparison.png").is_file()


def test_members_and_steps_from_the_command_line(compared, tmp_path, capsys):
    assert main(["compare", str(compared()), "--members", "atm", "--steps", "8", "--num_rounds", "4"]) == 0
    result = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert set(result["rows"]) == {"atm"}
    assert result["rows"]["atm"]["cost"]["optimizer_steps"] == 16
    assert len(result["cells"]["0"]["atm"]["curve"]) == 4


@pytest.mark.parametrize(
    ("arguments", "members", "message"),
    [
        ([], {"atm": {"num_rounds": 3}}, "differ in budget: atm cannot share out 4 steps over 3 rounds"),
        ([], {"joint": {"lerning_rate": 1}}, "compare.members.joint has the unknown key 'lerning_rate'"),
        ([], {"joint": {"learning_rate": "fast"}}, "compare.members.joint: argument --learning_rate"),
        ([], {"sgd": {}}, "There is no baseline 'sgd'"),
        ([], [3], "There is no baseline '3'"),
        ([], {"joint": "x"}, "compare.members.joint must hold keys and values, not 'x'"),
        (["--steps", "0"], MEMBERS, "compare.steps is 0"),
        (["--members", "jiont"], MEMBERS, "unknown member 'jiont'; the members are atm, cold_fusion"),
        (["--seeds", "1", "1"], MEMBERS, "seeds must be different"),
    ],
)
def test_bad_input(compared, capsys, tmp_path, arguments, members, message):
    fails(["compare", compared(members), *arguments], capsys, message)
    assert not (tmp_path / "run").exists()


def test_a_file_without_members(config, capsys):
    fails(["compare", config()], capsys, "the config has no compare.members")


@pytest.mark.parametrize(("key", "value"), [("seeds", "many"), ("seeds", [1.5]), ("steps", "all"), ("steps", True)])
def test_numbers_that_are_none(compared, capsys, key, value):
    fails(["compare", compared(**{key: value})], capsys, f"compare.{key} must be whole numbers")


def test_one_seed_need_not_be_a_list(compared, tmp_path):
    assert main(["compare", str(compared(["atm"], seeds=0))]) == 0
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["seeds"] == [0]


def test_a_task_without_validation_data(compared, tmp_path, capsys):
    path = compared({"atm": {}})
    path.write_text(path.read_text().replace("dataset: tone", "dataset: tone\n    eval_split: null"))
    fails(["compare", path], capsys, "task 'tone' needs train_split and eval_split")
