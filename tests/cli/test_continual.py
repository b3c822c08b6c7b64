"""`hf-atm train` with a schedule, on files."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_atm import MultiTaskModel, PrototypicalTaskHead
from hf_atm.cli.main import main

from .conftest import training
from .test_commands import fails


TASKS = {
    "tone": {"dataset": "tone", "test_split": "test"},
    "likeness": {"dataset": "likeness", "test_split": "test", "metrics": ["spearmanr"]},
    "again": {"dataset": "tone", "test_split": "test"},
}
SCHEDULE = [["tone"], ["likeness", "again"]]


@pytest.fixture
def scheduled(config, tmp_path):
    def write(continual=None, schedule=SCHEDULE, settings=None, **changes):
        return config(
            tasks=changes.pop("tasks", TASKS),
            schedule=schedule,
            continual=continual or {},
            training=training(tmp_path, **{"num_rounds": 2, "local_steps": 2, **(settings or {})}),
            **changes,
        )

    return write


def result(tmp_path):
    return json.loads((tmp_path / "run" / "continual.json").read_text())


def test_every_stage_leaves_a_model_of_all_tasks_so_far(scheduled, tmp_path, capsys):
    weights = {"tone": 1.0, "likeness": 0.0, "again": 1.0}
    path = scheduled({"replay": 0.25, "references": True}, settings={"task_weights": weights}, export_tasks=True)
    assert main(["train", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "stage 2 of 2 done: likeness, again" in shown and "stage 1 (+ tone)" in shown
    assert "test: average" in shown and "backward" in shown and "forward" in shown
    facts = result(tmp_path)
    assert [list(stage["validation"]) for stage in facts["stages"]] == [["tone"], ["tone", "likeness", "again"]]
    assert facts["stages"][1]["replayed"] == {"tone": 8}
    assert set(facts["references"]["test"]) == {"likeness", "again"}
    first, last = (MultiTaskModel.from_pretrained(tmp_path / "run" / f"stage-{k}") for k in (1, 2))
    assert set(first.heads) == {"tone"} and set(last.heads) == set(TASKS)
    assert (tmp_path / "run" / "stage-2" / "tasks" / "again" / "config.json").is_file()
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    card = ModelCard.load(tmp_path / "run" / "stage-2" / "README.md")
    assert "continual-learning" in card.data.tags and "base_model" not in card.data.to_dict()
    assert "3 tasks, which arrived in 2 stages: tone, likeness, again" in card.text
    score = facts["stages"][0]["validation"]["tone"]
    assert (
        f"| stage 1 (+ tone) | {score:.3f} |  |  |" in card.text
        and "Replayed in the last stage: 8 of tone" in card.text
    )
    assert f"backward {facts['transfer']['validation']['backward']:+.3f}" in card.text
    assert str(tmp_path) not in card.content and "2411.03055" in card.content
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    exec(code.replace("run-stage-2", str(tmp_path / "run" / "stage-2")), {})
    assert main(["push", str(tmp_path / "run" / "stage-2"), "lab/x", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "README.md" in shown and "no model card" not in shown


def test_all_examples_replayed_in_one_stage_is_plain_atm(scheduled, config, tmp_path):
    path = scheduled({"replay": 1.0}, schedule=[["tone", "likeness", "again"]])
    assert main(["train", str(path)]) == 0
    staged = load_file(tmp_path / "run" / "stage-1" / "model.safetensors")
    path = config(tasks=TASKS, training=training(tmp_path, output_dir=str(tmp_path / "plain"), local_steps=2))
    assert main(["train", str(path)]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(staged[name], plain[name]) for name in plain)


def test_prototypes_come_from_training_data_and_follow_the_weights(config, tmp_path, monkeypatch, capsys):
    tasks = {**TASKS, "tone": {**TASKS["tone"], "head": "prototypical", "k_shot": 2, "n_query": 2}}

    def scheduled(replay, ewc=0.0, **changes):
        return config(
            tasks={**tasks, "tone": {**tasks["tone"], **changes}},
            schedule=SCHEDULE,
            continual={"replay": replay, "ewc": ewc, "fisher_examples": 4},
            training=training(tmp_path, num_rounds=2, local_steps=2),
        )

    fails(
        ["train", scheduled(0.1)],
        capsys,
        "replay=0.1 keeps too few examples, raise it: Task 'tone' has a prototypical head",
    )
    fails(["train", scheduled(0.5, k_shot=40)], capsys, "Task 'tone' has a prototypical head")
    assert not (tmp_path / "run").exists()
    fitted = []
    plain = PrototypicalTaskHead.fit
    monkeypatch.setattr(
        PrototypicalTaskHead,
        "fit",
        lambda head, features, labels: fitted.append(len(features)) or plain(head, features, labels),
    )
    assert main(["train", str(scheduled(0.5, ewc=1.0))]) == 0
    # Of 32 training examples, of which 16 are replayed; never of the 8 that it is scored on.
    assert set(fitted) == {32, 16}
    first, last = (MultiTaskModel.from_pretrained(tmp_path / "run" / f"stage-{k}").heads["tone"] for k in (1, 2))
    assert first.fitted and last.fitted and not torch.equal(first.prototypes, last.prototypes)
    assert 0 <= result(tmp_path)["stages"][1]["test"]["tone"] <= 1


def test_without_replay_earlier_heads_rest(scheduled, tmp_path):
    assert main(["train", str(scheduled({"replay": 0, "ewc": 10.0, "fisher_examples": 4}))]) == 0
    first, last = (load_file(tmp_path / "run" / f"stage-{k}" / "model.safetensors") for k in (1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]) is name.startswith("heads.tone.")
    held = load_file(tmp_path / "run" / "stage-1" / "consolidation.safetensors")
    assert all(name.split("/")[1].startswith("backbone.") for name in held)
    assert sum(float(t.sum()) for name, t in held.items() if name.startswith("importance/")) > 0


def test_a_stronger_pull_keeps_earlier_weights_closer(scheduled, tmp_path):
    moved = []
    for ewc in (0.0, 1e9):
        assert main(["train", str(scheduled({"replay": 0, "ewc": ewc, "fisher_examples": 8}))]) == 0
        first, last = (load_file(tmp_path / "run" / f"stage-{k}" / "model.safetensors") for k in (1, 2))
        shared = [name for name in first if name.startswith("backbone.encoder.layer.0")]
        moved.append(sum(float((first[name] - last[name]).norm()) for name in shared))
        shutil.rmtree(tmp_path / "run")
    assert moved[1] < 0.8 * moved[0]


def test_opcm_merges_stored_vectors_in_the_order_of_arrival(scheduled, encoder, tmp_path):
    assert main(["train", str(scheduled({"method": "opcm", "compression": None}))]) == 0
    from transformers import BertModel

    from hf_atm.continual import TaskVectorArchive

    archive = TaskVectorArchive(tmp_path / "run" / "task_vectors", None)
    move = archive.merge(["tone", "likeness", "again"])
    start = BertModel.from_pretrained(encoder).state_dict()
    last = load_file(tmp_path / "run" / "stage-2" / "model.safetensors")
    for name, tensor in move.items():
        wanted = start[name.removeprefix("backbone.")] + tensor
        assert torch.allclose(last[name], wanted, atol=1e-6)
    assert set(result(tmp_path)["stages"][1]["stored_bytes"]) == {"likeness", "again"}


def test_an_interrupted_schedule_goes_on(scheduled, tmp_path):
    path = scheduled({"replay": 0.5})
    assert main(["train", str(path)]) == 0
    wanted = result(tmp_path)
    stamp = (tmp_path / "run" / "stage-1" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "run" / "stage-2")
    (tmp_path / "run" / "continual.json").unlink()
    assert main(["train", str(path)]) == 0
    assert result(tmp_path)["stages"][1]["test"] == wanted["stages"][1]["test"]
    assert (tmp_path / "run" / "stage-1" / "model.safetensors").stat().st_mtime_ns == stamp


def test_language_models_and_adapters(scheduled, decoder, tmp_path):
    tasks = {
        name: {"dataset": name, "text_columns": column, "max_length": 4}
        for name, column in (("tone", "text"), ("likeness", "a"))
    }
    path = scheduled({"replay": 0}, schedule=["tone", "likeness"])
    import yaml

    content = yaml.safe_load(path.read_text()) | {"tasks": tasks, "model": {"causal_lm": "decoder", "peft": {"r": 2}}}
    path.write_text(yaml.safe_dump(content))
    assert main(["train", str(path)]) == 0
    LlamaForCausalLM.from_pretrained(tmp_path / "run" / "stage-2")
    assert not (tmp_path / "run" / "stage-2" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": [["tone"]]}, "schedule leaves out again, likeness"),
        ({"continual": {"reply": 1}}, "continual has the unknown key 'reply'"),
        ({"settings": {"task_weights": {"tone": 1.0}}}, "task_weights must name exactly the tasks"),
        (
            {"settings": {"local_steps": None}, "continual": {"replay": 3}},
            "has 3 examples x local_epochs=1 = 3, less than",
        ),
        ({"settings": {"full_batch": True, "local_steps": None}}, "full_batch needs data sets of equal size"),
        ({"schedule": [{"a": "b"}]}, "stage 1 of schedule must be a task's name or a list"),
        ({"settings": {"task_specific_modules": ["*.LayerNorm"]}}, "pattern '*.LayerNorm' matches no parameter"),
        (
            {
                "continual": {"replay": 0},
                "settings": {
                    "load_best_model_at_end": True,
                    "eval_strategy": "epoch",
                    "save_strategy": "epoch",
                    "metric_for_best_model": "tone_accuracy",
                },
            },
            "metric_for_best_model='tone_accuracy' is not measured in stage 2",
        ),
        (
            {
                "continual": {"method": "opcm"},
                "tasks": {**TASKS, "tone": {"dataset": "tone", "head": "prototypical", "k_shot": 2, "n_query": 2}},
            },
            "Task 'tone' has a prototypical head, whose prototypes would stay",
        ),
        ({"settings": {"push_to_hub": True}}, "push_to_hub uploads what one run left"),
        ({"continual": {"replay": 33}}, "replay=33 is more than the 32 examples of task"),
    ],
)
def test_bad_input(scheduled, tmp_path, capsys, changes, message):
    fails(["train", scheduled(**changes)], capsys, message)
    assert not (tmp_path / "run").exists()


def test_settings_without_a_schedule(config, capsys):
    fails(["train", config(continual={"replay": 1})], capsys, "config has continual settings but no schedule")


def test_a_finished_schedule_with_other_settings(scheduled, tmp_path, capsys):
    assert main(["train", str(scheduled({"replay": 0.5}))]) == 0
    capsys.readouterr()
    fails(["train", scheduled({"replay": 0.25})], capsys, "made with other settings (continual.replay: 0.5 -> 0.25)")
    path = scheduled({"replay": 0.5})
    fails(["train", path, "--learning_rate", "0.5"], capsys, "settings.learning_rate: 0.001 -> 0.5")
    # References are tuned apart, and may be asked for later.
    assert main(["train", str(scheduled({"replay": 0.5, "references": True}))]) == 0
    assert set(result(tmp_path)["references"]["validation"]) == {"likeness", "again"}


def test_a_stage_goes_on_from_its_checkpoint(scheduled, tmp_path, monkeypatch):
    from hf_atm import ATMTrainer

    path = scheduled({"replay": 0.5}, settings={"save_strategy": "epoch"})
    assert main(["train", str(path)]) == 0
    wanted = load_file(tmp_path / "run" / "stage-2" / "model.safetensors")
    shutil.rmtree(tmp_path / "run")
    starts, save, train = [], ATMTrainer._save_checkpoint, ATMTrainer.train

    def interrupted(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if "stage-2" in self.args.output_dir:
            raise KeyboardInterrupt

    def watched(self, resume_from_checkpoint=None, *args, **kwargs):
        starts.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint, *args, **kwargs)

    monkeypatch.setattr(ATMTrainer, "_save_checkpoint", interrupted)
    assert main(["train", str(path)]) == 130
    monkeypatch.setattr(ATMTrainer, "_save_checkpoint", save)
    monkeypatch.setattr(ATMTrainer, "train", watched)
    assert main(["train", str(path)]) == 0
    assert starts == [True]
    again = load_file(tmp_path / "run" / "stage-2" / "model.safetensors")
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_weights_by_task_go_along_with_the_stages(scheduled, tmp_path):
    weights = {"tone": 1.0, "likeness": 2.0, "again": 0.5}
    assert main(["train", str(scheduled(settings={"task_weights": weights}))]) == 0
    assert result(tmp_path)["stages"][1]["rounds"][0]["weights"] == weights


def test_only_some_tasks_have_a_test_split(scheduled, tmp_path):
    path = scheduled()
    path.write_text(path.read_text().replace("test_split: test", "test_split: null", 1))
    assert main(["train", str(path)]) == 0
    assert len(result(tmp_path)["stages"][1]["test"]) == 2


def test_references_with_an_adapter_start_from_the_start(scheduled, tmp_path):
    path = scheduled({"replay": 0.5, "references": True}, model={"backbone": "encoder", "peft": {"r": 2}})
    assert main(["train", str(path)]) == 0
    wanted = result(tmp_path)["references"]
    shutil.rmtree(tmp_path / "run" / "references")
    # Now stage 1 is read from disk, and nothing has touched the model in memory.
    assert main(["train", str(path)]) == 0
    assert result(tmp_path)["references"] == wanted


def test_new_tasks_of_opcm_start_with_the_private_modules_of_the_start(scheduled, encoder, tmp_path):
    settings = {"task_specific_modules": ["LayerNorm"], "learning_rate": "1e-12"}
    assert main(["train", str(scheduled({"method": "opcm"}, settings=settings))]) == 0
    last = load_file(tmp_path / "run" / "stage-2" / "model.safetensors")
    copies = [name for name in last if name.startswith("task_specific.again.")]
    start = load_file(encoder / "model.safetensors")
    for name in copies:
        plain = name.removeprefix("task_specific.again.").replace("/", ".")
        assert torch.allclose(last[name], start[plain], atol=1e-6)
    assert copies
