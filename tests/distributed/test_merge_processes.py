"""The tensors of one merge shared out over processes: the same bytes as from one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.merging.checkpoints.test_align import QUICK, bert, shaken, write
from tests.merging.checkpoints.testing_utils import load_checkpoint, write_checkpoint, write_models

from .test_processes import free_port


pytestmark = [pytest.mark.distributed]


def launch(recipe, output, processes):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port())]
    command += ["-m", "hf_atm.cli", "merge", str(recipe), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)


@pytest.mark.parametrize(("method", "scale"), [("ties", "norm"), ("task_arithmetic", 0.4)])
def test_two_processes_write_what_one_writes(method, scale, tmp_path):
    recipe = write_models(tmp_path, shards=2)
    recipe |= {"merge_method": method, "parameters": {"scaling_coefficient": scale}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for processes in (1, 2):
        done = launch(tmp_path / "recipe.json", tmp_path / f"out{processes}", processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("written to") == 1
    assert (tmp_path / "out1" / "model.safetensors").read_bytes() == (
        tmp_path / "out2" / "model.safetensors"
    ).read_bytes()
    records = [json.loads((tmp_path / f"out{n}" / "merge_config.json").read_text()) for n in (1, 2)]
    assert records[0] == records[1]
    assert not (tmp_path / "out2.incomplete").exists()


def test_the_first_process_aligns_for_all(tmp_path):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed) for seed in range(2)]
    recipe = {"models": folders, "align": QUICK}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for processes in (1, 2):
        done = launch(tmp_path / "recipe.json", tmp_path / f"out{processes}", processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / f"out{processes}" for processes in (1, 2))
    for name in ("model.safetensors", "alignment/alignment.safetensors", "merge_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert json.loads((one / "merge_config.json").read_text())["alignment"]["moved"]["m1"] > 0


def test_an_error_on_one_process_ends_all(tmp_path):
    recipe = write_models(tmp_path)
    tensors = load_checkpoint(tmp_path / "m1")
    write_checkpoint(tmp_path / "m1", {**tensors, "model.scale": torch.tensor(float("inf"))})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = launch(tmp_path / "recipe.json", tmp_path / "out", 2)
    assert done.returncode != 0 and "'model.scale' of 'm1'" in done.stderr
    assert not (tmp_path / "out").exists()
