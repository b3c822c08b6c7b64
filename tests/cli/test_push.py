"""`hf-atm push`, `hf-atm train --push_to_hub` and `hf-atm merge --push-to-hub`, against a Hub on this machine."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_atm.cli.main import main

from ..hub_server import Fault
from ..merging.checkpoints.testing_utils import write_models


@pytest.fixture
def recipe(tmp_path):
    content = {**write_models(tmp_path), "merge_method": "mean"}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    return str(tmp_path / "recipe.json")


def test_a_run_is_trained_described_and_pushed(config, hub, tmp_path, capsys):
    assert main(["train", str(config(export_tasks=True)), "--eval_strategy", "epoch", "--quiet"]) == 0
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert 'from_pretrained("run"' in card and (run / "figures" / "rounds.svg").is_file()
    capsys.readouterr()
    assert main(["push", str(run), "me/tones", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "tasks/tone/model.safetensors" in listed and hub.repositories == {}
    assert main(["push", str(run), "me/tones"]) == 0
    assert f"{hub.endpoint}/me/tones/commit/" in capsys.readouterr().out
    repository = hub.repositories["me/tones"]
    assert repository.private and len(repository.commits) == 1
    assert sorted(repository.branches["main"]) == sorted(listed.splitlines()[:-1])
    assert 'from_pretrained("me/tones"' in repository.branches["main"]["README.md"].decode()
    assert (run / "README.md").read_text() == card


def test_training_pushes_everything_in_one_commit(config, hub, tmp_path):
    arguments = ["--push_to_hub", "true", "--hub_model_id", "lab/tones", "--hub_strategy", "end"]
    assert main(["train", str(config(export_tasks=True)), *arguments, "--quiet"]) == 0
    repository = hub.repositories["lab/tones"]
    assert repository.private and [entry["summary"] for entry in repository.commits] == ["End of training"]
    files = repository.branches["main"]
    assert {"model.safetensors", "tasks/tone/config.json", "README.md", "atm_report.json"} <= set(files)


def test_a_card_of_somebody_is_not_replaced(config, tmp_path, capsys):
    assert main(["train", str(config()), "--quiet"]) == 0
    card = tmp_path / "run" / "README.md"
    card.write_text("By hand.")
    assert main(["card", str(tmp_path / "run")]) == 2
    assert "was not written by a program; move it, or replace it with --overwrite" in capsys.readouterr().err
    assert card.read_text() == "By hand."
    assert main(["card", str(tmp_path / "run"), "--overwrite", "--quiet"]) == 0
    assert "Written by hf-atm" in card.read_text()


@pytest.mark.parametrize(("flags", "private"), [([], True), (["--public"], False)])
def test_a_finished_merge_goes_up_in_one_commit(flags, private, recipe, hub, tmp_path):
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", "merged", *flags]) == 0
    repository = hub.repositories["me/merged"]
    assert repository.private is private and len(repository.commits) == 1
    files = repository.branches["main"]
    assert sorted(files) == ["README.md", "config.json", "merge_config.json", "model.safetensors"]
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert 'from_pretrained("me/merged")' in files["README.md"].decode()


def test_a_dry_run_of_a_merge_uploads_nothing(recipe, hub, tmp_path):
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", "merged", "--dry-run"]) == 0
    assert hub.repositories == {}


def test_a_failed_upload_leaves_the_merge_on_disk(recipe, hub, tmp_path, capsys):
    hub.faults.append(Fault("repos/create", 503, times=99))
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", "merged"]) == 2
    error = capsys.readouterr().err
    assert "nothing was uploaded" in error and f"hf-atm push {tmp_path / 'out'} merged" in error
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("repository", "reason"), [("a/b/c", "is no Hub id such as"), ("them/merged", "namespace of 'them'")]
)
def test_what_cannot_be_uploaded_is_not_merged(repository, reason, recipe, hub, tmp_path, capsys):
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", repository]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and hub.repositories == {}


def test_bad_input(hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "nowhere"), "me/x"], "There is no folder"),
        ([str(tmp_path / "empty"), "me/x"], "holds no model"),
    ):
        assert main(["push", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert hub.repositories == {}


def test_a_dense_update_goes_up_though_it_has_no_configuration(hub, tmp_path):
    for name in ("a", "b"):
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        model.save_pretrained(tmp_path / name)
    recipe = {"models": [{"model": str(tmp_path / name)} for name in ("a", "b")], "adapters": {"output": "delta"}}
    (tmp_path / "recipe.json").write_text(
        json.dumps({**recipe, "merge_method": "dare_ties", "parameters": {"density": 1.0}})
    )
    assert main(["merge", str(tmp_path / "recipe.json"), str(tmp_path / "out"), "--push-to-hub", "update"]) == 0
    files = hub.repositories["me/update"].branches["main"]
    assert sorted(files) == ["README.md", "merge_config.json", "update.safetensors"]
    card = files["README.md"].decode()
    assert "2311.03099" in card and "2306.01708" in card and 'load_file("update.safetensors")' in card
