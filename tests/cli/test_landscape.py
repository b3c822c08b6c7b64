"""`hf-atm landscape` on a run: corners are the models' own losses, rounds lie where their checkpoints are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from hf_atm import MultiTaskModel
from hf_atm.cli.main import main


def read(run):
    return json.loads((run / "landscape.json").read_text())


def test_corners_rounds_and_card(config, tmp_path, capsys):
    path = str(config())
    settings = ["--save_strategy", "epoch", "--num_rounds", "2", "--learning_rate", "0.01", "--quiet"]
    assert main(["train", path, *settings]) == 0
    run = tmp_path / "run"
    arguments = ["landscape", str(run), path, "--expert", "tone", "--resolution", "3", "--examples", "8"]
    capsys.readouterr()
    before = (run / "model.safetensors").read_bytes()
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    result = read(run)
    assert [len(result["losses"]), len(result["x"])] == [3, 3] and (run / "model.safetensors").read_bytes() == before
    # The merged model's own loss, from the evaluation of the whole split (8 examples per task).
    assert main(["evaluate", str(run), path, "--output", str(tmp_path / "metrics.json"), "--quiet"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert result["corner_losses"][1] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    # Distances are those of the weights.
    start = dict(BertModel.from_pretrained(tmp_path / "encoder").named_parameters())
    merged = dict(MultiTaskModel.from_pretrained(run).backbone.named_parameters())
    distance = sum(((merged[name] - start[name]).double() ** 2).sum() for name in merged).sqrt().item()
    assert result["corners"][0] == [0, 0] and result["corners"][1] == pytest.approx([distance, 0], rel=1e-4)
    # The last round is the merged model, and so lies in its corner.
    assert len(result["path"]) == 2
    assert result["path"][-1] == pytest.approx([distance, 0, 0], abs=1e-3 * distance)
    checkpoint = load_file(next(run.glob("checkpoint-*")) / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in checkpoint.values())
    assert main(["card", str(run), "--quiet"]) == 0
    assert "(figures/landscape.png)" in (run / "README.md").read_text()


def test_bad_input(config, tmp_path, capsys):
    path = str(config())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for arguments, message in (
        ([str(tmp_path), path, "--expert", "tone"], "holds no whole model"),
        ([str(tmp_path / "model"), path, "--expert", "nobody"], "unknown task 'nobody'; the tasks of"),
        ([str(tmp_path / "model"), path, "--expert", "tone", "--resolution", "1"], "--resolution must be at least 2"),
    ):
        assert main(["landscape", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
