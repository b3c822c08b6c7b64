"""Several processes give what one gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.testing_utils import largest_difference


SCRIPT = Path(__file__).with_name("train.py")
pytestmark = [pytest.mark.distributed]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder, processes, *options, **settings):
    """Run the script and return every process's weights and the log."""
    command = [sys.executable]
    if processes > 1:
        # `--multi_gpu` is the launcher's word for "several processes"; they run on the CPU, over gloo.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(SCRIPT), str(folder), *options, "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    states = [torch.load(folder / f"state-{rank}.pt", weights_only=True) for rank in range(processes)]
    return states, json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("options", [[], ["--lora"]], ids=["full weights", "LoRA"])
def test_two_processes_equal_one(tmp_path, options):
    (one,), alone = run(tmp_path / "one", 1, "--batch", "8", *options)
    (first, second), together = run(tmp_path / "two", 2, "--batch", "4", *options)
    assert largest_difference(first, second) == 0.0
    assert largest_difference(one, first) <= 1e-5
    assert together["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
    for alone_scores, together_scores in zip(alone["scores"], together["scores"], strict=True):
        assert together_scores == pytest.approx(alone_scores, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"head_steps": 1},
        {"outer_learning_rate": "search", "task_weights": "loss_gap", "task_vector_surgery": "pcgrad"},
    ],
    ids=["head steps", "measured"],
)
def test_two_processes_settle_and_measure_as_one(tmp_path, settings):
    # The Trainer's loss counts what fills up an uneven last batch, so that a measured loss needs even ones.
    even = ("--eval-size", "16")
    (one,), alone = run(tmp_path / "one", 1, "--batch", "8", *even, **settings)
    (first, second), together = run(tmp_path / "two", 2, "--batch", "4", *even, **settings)
    assert largest_difference(first, second) == 0.0
    assert largest_difference(one, first) <= 1e-5
    assert together["scores"][-1] == pytest.approx(alone["scores"][-1], abs=1e-4)


def test_two_processes_align_as_one(tmp_path):
    settings = {"align_every_round": True}
    (one,), alone = run(tmp_path / "one", 1, "--batch", "8", "--reorder", **settings)
    (first, second), together = run(tmp_path / "two", 2, "--batch", "4", "--reorder", **settings)
    assert largest_difference(first, second) == 0.0
    assert largest_difference(one, first) <= 1e-5
    assert alone["moved"] == together["moved"] and alone["moved"][0]["shape"] > 10


def test_episodes_are_those_of_one_process(tmp_path):
    (one,), alone = run(tmp_path / "one", 1, "--batch", "8", "--few", local_steps=3)
    (first, second), together = run(tmp_path / "two", 2, "--batch", "4", "--few", local_steps=3)
    assert largest_difference(first, second) == 0.0
    assert largest_difference(one, first) <= 1e-5
    assert together["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
    assert together["scores"][-1] == pytest.approx(alone["scores"][-1], abs=1e-4)


def test_gradient_norms_do_not_depend_on_accumulation(tmp_path):
    (one,), whole = run(tmp_path / "whole", 1, "--batch", "8")
    (two,), parts = run(tmp_path / "parts", 1, "--batch", "2", "--accumulation", "4")
    assert parts["grad_norms"] == pytest.approx(whole["grad_norms"], rel=1e-4)
    assert largest_difference(one, two) <= 1e-5


def test_two_processes_resume_bit_by_bit(tmp_path):
    options = ("--dropout", "0.3", "--batch-norm")
    settings = {"save_strategy": "no", "ddp_find_unused_parameters": True}
    (first, second), _ = run(tmp_path / "whole", 2, *options, **settings)
    assert largest_difference(first, second) == 0.0
    # One process of two is told to stop inside the second segment; both save, at the same step.
    run(tmp_path / "stopped", 2, *options, "--term", enable_jit_checkpoint=True, **settings)
    checkpoint = str(tmp_path / "stopped" / "checkpoint-4")
    (resumed, _), _ = run(tmp_path / "resumed", 2, *options, "--resume", checkpoint, **settings)
    assert largest_difference(first, resumed) == 0.0
