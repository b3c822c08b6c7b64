"""A resumed run equals the uninterrupted one bit by bit, wherever it stopped."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_atm import ATMCallback, checkpoint
from tests.testing_utils import METRICS, TinyModel, largest_difference, make_data, make_trainer, parameters_of


SIZES = {"colour": 24, "shape": 16, "size": 16}
EVAL = {task: make_data(task, 8) for task in SIZES}
STEPS = 7  # per round, at a batch of 8: 3 + 2 + 2

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01}
CASES = {
    "kept vectors": {"keep_task_vectors": True},
    "ties": {"merge_method": "ties", "merge_kwargs": {"density": 0.5}},
    "dare": {"merge_method": "dare", "merge_kwargs": {"density": 0.5, "seed": 3}},
    "momentum": {"outer_momentum": 0.8, "outer_learning_rate": 0.7},
    "clipped to the mean": {"max_task_vector_norm": "mean"},
    "clipped to a number": {"max_task_vector_norm": 0.05},
    "norm-restoring": {"outer_learning_rate": "norm"},
    "moments kept": {"optimizer_policy": "keep", **ADAM},
    "moments per task": {"optimizer_policy": "per_task", **ADAM},
    "second moment per task": {"optimizer_policy": "per_task_second_moment", **ADAM},
    "shared moments": {"optimizer_policy": "shared", **ADAM},
    "schedule over the run": {"lr_schedule_scope": "run", "lr_scheduler_type": "linear", "warmup_steps": 2, **ADAM},
    "schedule per segment": {"lr_scheduler_type": "cosine", **ADAM},
    "fractional epochs": {"local_epochs": 0.5},
    "full diagnostics": {"diagnostics": "full", **ADAM},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


def build(folder, batch_norm=False, lora=False, **changes):
    data = {task: make_data(task, size) for task, size in SIZES.items()}
    peft = {"peft_config": LoraConfig(r=2, target_modules=["body.0", "body.2"], lora_dropout=0.2)} if lora else {}
    changes = {"num_rounds": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": False, **changes}
    return make_trainer(folder, TinyModel(dropout=0.3, batch_norm=batch_norm), train_dataset=data, **peft, **changes)


# Inside the first segment, at its end, at the end of a round, inside a later round.
PLACES = (1, 3, STEPS, STEPS + 4)


def check_checkpoints(tmp_path, places=PLACES, **changes):
    whole = build(tmp_path / "whole", **changes)
    whole.train()
    expected = parameters_of(whole.model)
    folders = checkpoint.checkpoints(str(tmp_path / "whole"))
    assert len(folders) == whole.state.max_steps
    for folder in (folders[place - 1] for place in places if place <= len(folders)):
        resumed = build(tmp_path / "resumed", **{**changes, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=folder)
        assert largest_difference(parameters_of(resumed.model), expected) == 0.0, folder
        for record, other in zip(resumed.report, whole.report, strict=True):
            assert record["cosines"] == other["cosines"]
            assert record["task_vector_norms"] == other["task_vector_norms"]
            assert record["diagnostics"] == other["diagnostics"]
        shutil.rmtree(tmp_path / "resumed")


def test_from_every_step(tmp_path):
    check_checkpoints(tmp_path, places=range(1, 2 * STEPS + 1))


@pytest.mark.parametrize("case", CASES)
def test_with(tmp_path, case):
    check_checkpoints(tmp_path, **CASES[case])


def test_with_batch_normalisation(tmp_path):
    check_checkpoints(tmp_path, batch_norm=True)


@pytest.mark.parametrize("mode", ["delta", "svd", "adapter"])
def test_with_an_adapter(tmp_path, mode):
    check_checkpoints(tmp_path, lora=True, lora_merge_mode=mode)


def test_with_an_adapter_and_batch_normalisation(tmp_path):
    check_checkpoints(tmp_path, lora=True, batch_norm=True)


def noisy(rows):
    """A random augmentation, and a column that only it needs."""
    features = torch.tensor(rows["raw"])
    return {"features": features + 0.1 * torch.randn_like(features), "labels": torch.tensor(rows["labels"])}


def noisy_data(size):
    data = {task: make_data(task, size).with_format(None).rename_column("features", "raw") for task in SIZES}
    return {task: dataset.with_transform(noisy) for task, dataset in data.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_with_random_augmentation(tmp_path, workers):
    settings = {"num_rounds": 2, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    model = TinyModel(dropout=0.3)
    whole = make_trainer(
        tmp_path / "whole",
        copy.deepcopy(model),
        train_dataset=noisy_data(32),
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    whole.train()
    for step in (1, 3, 8):
        resumed = make_trainer(tmp_path / str(step), copy.deepcopy(model), train_dataset=noisy_data(32), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0.0


def test_with_an_adapter_and_ties(tmp_path):
    check_checkpoints(tmp_path, lora=True, merge_method="ties", merge_kwargs={"density": 0.5}, outer_momentum=0.5)


def adapters_in(folder):
    return {path.parent.name: load_file(path) for path in Path(folder, "adapters").glob("*/adapter_model.safetensors")}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_merge_mode": "delta"},
        {"lora_merge_mode": "svd"},
        {"merge_method": "ties", "merge_kwargs": {"density": 0.5}, "outer_momentum": 0.5},
        {
            "task_vector_surgery": "pcgrad",
            "max_task_vector_norm": 0.05,
            "task_weights": "loss_gap",
            "eval_dataset": EVAL,
        },
    ],
)
def test_experts_of_an_adapter_are_written_as_if_nothing_had_happened(tmp_path, changes):
    changes = {**changes, "lora": True, "head_steps": 1}
    whole = build(tmp_path / "whole", **changes)
    whole.train()
    whole.save_model(str(tmp_path / "expected"))
    expected = adapters_in(tmp_path / "expected")
    assert set(expected) == set(SIZES) and any("heads" in name for name in expected["colour"])
    # In the last round: after the first task, in the second, after the merge while heads settle; and after the end.
    steps = whole.state.max_steps
    for step in (steps - STEPS + 2, steps - STEPS + 3, steps - 2, steps):
        resumed = build(tmp_path / str(step), **{**changes, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        resumed.save_model(str(tmp_path / "resumed"))
        found = adapters_in(tmp_path / "resumed")
        assert set(found) == set(SIZES), step
        for task, tensors in expected.items():
            assert largest_difference(found[task], tensors) == 0.0, (step, task)
        shutil.rmtree(tmp_path / "resumed")


def test_evaluation_in_between_changes_nothing(tmp_path):
    plain = build(tmp_path / "plain", save_strategy="no")
    plain.train()
    data = {task: make_data(task, 8) for task in SIZES}
    evaluated = build(
        tmp_path / "evaluated",
        save_strategy="no",
        eval_dataset=data,
        compute_metrics=METRICS,
        eval_strategy="steps",
        eval_steps=2,
        eval_experts=True,
    )
    evaluated.train()
    assert largest_difference(parameters_of(plain.model), parameters_of(evaluated.model)) == 0.0


def test_true_means_the_last_complete_checkpoint(tmp_path):
    whole = build(tmp_path)
    whole.train()
    expected = parameters_of(whole.model)
    # What a kill during a save leaves behind: a folder without the loop's state, and a staging folder.
    last = tmp_path / f"checkpoint-{2 * STEPS}"
    (last / checkpoint.STATE_NAME).unlink()
    (tmp_path / checkpoint.STAGING_NAME / "checkpoint-99").mkdir(parents=True)
    resumed = build(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(parameters_of(resumed.model), expected) == 0.0
    assert not (tmp_path / checkpoint.STAGING_NAME).exists()


class Stop(ATMCallback):
    """Stops after a number of steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_run_that_stops_inside_a_round_leaves_merged_weights(tmp_path):
    round_ends = {}

    class Watch(ATMCallback):
        def on_round_end(self, args, state, control, *, round, model, **kwargs):
            round_ends[round] = parameters_of(model)

    trainer = build(tmp_path, callbacks=[Watch(), Stop(STEPS + 4)], save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == STEPS + 4
    for name, value in parameters_of(trainer.model).items():
        if not name.startswith("heads."):
            assert torch.equal(value, round_ends[0][name])


def test_a_full_disk_leaves_the_good_checkpoint(tmp_path, monkeypatch):
    trainer = build(tmp_path, save_steps=STEPS)
    good = tmp_path / f"checkpoint-{STEPS}"
    saves = []

    def fail(self, output_dir):
        saves.append(output_dir)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer), "_save_rng_state", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert checkpoint.checkpoints(str(tmp_path)) == [str(good)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [good.name]


def test_overwriting_a_checkpoint_keeps_the_old_one_until_the_new_one_is_whole(tmp_path):
    final = tmp_path / "checkpoint-5"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(RuntimeError):
        with checkpoint.staged_checkpoint(str(tmp_path), final.name, True, lambda: None) as staging:
            Path(staging, final.name).mkdir(parents=True)
            raise RuntimeError("killed")
    assert (final / "old").exists()
    with checkpoint.staged_checkpoint(str(tmp_path), final.name, True, lambda: None) as staging:
        Path(staging, final.name).mkdir(parents=True)
        Path(staging, final.name, "new").touch()
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == [final.name]


def test_a_kill_between_two_renames_is_repaired(tmp_path):
    staged = tmp_path / checkpoint.STAGING_NAME / "checkpoint-5"
    staged.mkdir(parents=True)
    (staged / checkpoint.STATE_NAME).touch()
    (staged.parent / "complete").touch()
    checkpoint.recover(str(tmp_path))
    assert checkpoint.checkpoints(str(tmp_path)) == [str(tmp_path / "checkpoint-5")]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import os, signal, threading
import torch
torch.set_num_threads(1)
from tests.test_resume import build
from hf_atm import ATMCallback

class Hang(ATMCallback):
    def on_substep_end(self, args, state, control, **kwargs): pass
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), {signal})
            manager = self.jit
            if manager is not None:
                # The grace period is over at once, in the worst place: between backward and step.
                manager.is_checkpoint_requested = True

jit = {jit}
hang = Hang()
trainer = build({folder!r}, save_strategy="no" if jit else "steps", save_steps=1, enable_jit_checkpoint=jit,
                callbacks=[hang])
hang.jit = next((c.jit_manager for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")), None)
trainer.callback_handler.callbacks.insert(1, trainer.callback_handler.callbacks.pop(
    trainer.callback_handler.callbacks.index(hang)))
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("jit", [True, False], ids=["SIGTERM", "SIGKILL"])
def test_after_a_signal(tmp_path, jit):
    whole = build(tmp_path / "whole", save_strategy="no")
    whole.train()
    folder = tmp_path / "killed"
    number = signal.SIGTERM if jit else signal.SIGKILL
    root = str(Path(__file__).resolve().parents[1])
    code = SCRIPT.format(root=root, signal=int(number), jit=jit, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == (0 if jit else -signal.SIGKILL), done.stderr
    assert checkpoint.checkpoints(str(folder)), done.stderr
    resumed = build(folder, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0.0


def test_another_run_is_refused_with_all_that_differs(tmp_path):
    build(tmp_path, save_steps=STEPS).train()
    other = build(tmp_path, num_rounds=3, merge_method="ties", merge_kwargs={"density": 0.2})
    with pytest.raises(ValueError, match=r"num_rounds: 2 -> 3.*merge_method: 'mean' -> 'ties'"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds another run"):
        build(tmp_path).train()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        build(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        build(tmp_path / "empty").train(resume_from_checkpoint=str(tmp_path))


def test_the_report_on_disk_is_the_trainers(tmp_path):
    trainer = build(tmp_path, save_strategy="no")
    trainer.train()
    stored = json.loads((tmp_path / checkpoint.REPORT_NAME).read_text())["rounds"]
    assert stored == json.loads(json.dumps(trainer.report))
    assert [record["round"] for record in stored] == [0, 1]
    assert set(stored[0]["losses"]) == set(SIZES)
