"""What a trainer saves, says and uploads."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from peft import LoraConfig
from safetensors.torch import load_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_atm import MultiTaskModel
from hf_atm.metrics import build_compute_metrics

from .hub_server import OURS, Fault
from .testing_utils import METRICS, TASKS, TinyModel, largest_difference, make_data, make_trainer, parameters_of


SPECS = {"a": {"num_labels": 2}, "b": {"num_labels": 3}}


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return MultiTaskModel.from_backbone(BertModel(config), tasks=SPECS, seed=0)


def texts():
    return {
        task: datasets.Dataset.from_dict(
            {
                "input_ids": [[1 + (i + j) % 9 for j in range(4)] for i in range(16)],
                "labels": [i % 2 for i in range(16)],
            }
        )
        for task in SPECS
    }


def run(folder, model=None, **settings):
    data = texts()
    values = {"train_dataset": data, "eval_dataset": data, "num_rounds": 2, "eval_strategy": "epoch"} | settings
    if values["eval_dataset"]:
        values["compute_metrics"] = build_compute_metrics(["accuracy"])
    trainer = make_trainer(folder, model or bert(), callbacks=[], **values)
    trainer.train()
    return trainer


def pushed(hub, name):
    return hub.repositories[name].branches["main"]


def test_push_to_hub_uploads_model_card_and_pictures_in_one_commit(hub, tmp_path):
    trainer = run(tmp_path / "run", hub_model_id="me/two-tasks", hub_token=OURS)
    commit = trainer.push_to_hub()
    files = pushed(hub, "me/two-tasks")
    assert len(hub.repositories["me/two-tasks"].commits) == 1 and hub.repositories["me/two-tasks"].private
    assert commit.commit_url.startswith(f"{hub.endpoint}/me/two-tasks")
    assert {"README.md", "config.json", "model.safetensors", "atm_report.json", "figures/rounds.png"} <= set(files)
    assert not any(name.startswith("checkpoint") or name == "training_args.bin" for name in files)
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("me/two-tasks")' in card.text and card.data.model_name == "two-tasks"
    loaded = MultiTaskModel.from_pretrained("me/two-tasks")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_a_token_is_neither_saved_nor_uploaded(hub, tmp_path):
    trainer = run(tmp_path / "run", hub_model_id="me/run", hub_token=OURS, save_strategy="epoch")
    trainer.push_to_hub()
    contents = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(contents) > 10 and trainer.args.hub_token == OURS
    assert any(path.name == "training_args.bin" for path in (tmp_path / "run").rglob("*"))
    for content in [*contents, *pushed(hub, "me/run").values()]:
        assert OURS.encode() not in content


@pytest.mark.parametrize(
    ("setting", "argument", "private"), [(None, None, True), (False, None, False), (True, False, False)]
)
def test_private_unless_asked(hub, tmp_path, setting, argument, private):
    trainer = run(tmp_path / "run", hub_model_id="run", hub_private_repo=setting, num_rounds=1)
    trainer.push_to_hub(private=argument, revision="first", commit_message="One round")
    repository = hub.repositories["me/run"]
    assert repository.private is private
    assert [(entry["summary"], entry["branch"]) for entry in repository.commits] == [("One round", "first")]


def test_exports_go_up_as_folders_that_stock_classes_load(hub, tmp_path):
    trainer = run(tmp_path / "run", hub_model_id="lab/run")
    trainer.model.to_task_model("b").save_pretrained(tmp_path / "run" / "tasks" / "b")
    future = trainer.push_to_hub(blocking=False)
    future.result(timeout=60)
    stock = AutoModelForSequenceClassification.from_pretrained("lab/run", subfolder="tasks/b")
    assert stock.config.num_labels == 3
    assert 'from_pretrained("lab/run", subfolder="tasks/b")' in pushed(hub, "lab/run")["README.md"].decode()


def test_an_adapter_in_delta_mode_goes_up_as_the_whole_model(hub, tmp_path):
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2, 3]] * 8})
    trainer = run(
        tmp_path / "run",
        LlamaForCausalLM(config),
        train_dataset={"x": ids, "y": ids},
        eval_dataset=None,
        eval_strategy="no",
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        hub_model_id="me/llama",
    )
    trainer.push_to_hub()
    files = pushed(hub, "me/llama")
    assert "adapter_model.safetensors" not in files and "adapters/x/adapter_model.safetensors" in files
    loaded = AutoModelForCausalLM.from_pretrained("me/llama", dtype=torch.float32)
    expected = trainer.model.merge_and_unload()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_checkpoints_go_up_as_the_strategy_says(hub, tmp_path, strategy):
    trainer = run(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id="me/run",
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="epoch",
    )
    trainer._finish_current_push()
    repository = hub.repositories["me/run"]
    files = set(repository.branches["main"])
    folders = {name.split("/")[0] for name in files if "/" in name}
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    expected = {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": names, "end": set()}
    assert folders == expected[strategy] and len(names) == 2
    assert ("model.safetensors" in files) is (strategy != "end")
    assert not any("optimizer" in name for name in files if "/" not in name)
    for folder in folders:
        assert {f"{folder}/atm_state.json", f"{folder}/optimizer.pt", f"{folder}/trainer_state.json"} <= files
    assert trainer.save_model() is None
    assert repository.commits[-1]["summary"] == "Model save"


def test_a_failed_upload_in_the_background_is_told(hub, tmp_path, monkeypatch):
    from hf_atm import saving

    said = []
    monkeypatch.setattr(saving.logger, "warning", said.append)
    hub.faults.append(Fault("/commit/", 403, times=99))
    trainer = run(tmp_path / "run", push_to_hub=True, hub_model_id="me/run", save_strategy="epoch")
    trainer._finish_current_push()
    assert said and "nothing was committed to it: the token may not write there" in said[0]
    assert trainer.report[-1]["round"] == 1


def test_somebody_elses_repository_is_refused_before_training(hub, tmp_path):
    with pytest.raises(ValueError, match="namespace of 'them'"):
        run(tmp_path / "run", push_to_hub=True, hub_model_id="them/run")
    with pytest.raises(OSError, match="does not accept the token"):
        run(tmp_path / "run", push_to_hub=True, hub_model_id="me/run", hub_token="hf_wrongToken123")
    assert hub.repositories == {} and not (tmp_path / "run").exists()


def test_the_card_is_ours_once_the_model_is_saved(tmp_path):
    trainer = run(tmp_path / "run")
    trainer.create_model_card(tags="mine", license="mit")
    first = ModelCard.load(tmp_path / "run" / "README.md")
    assert {"atm", "model-merging", "mine", "generated_from_trainer"} <= set(first.data.tags)
    trainer.save_model()
    trainer.create_model_card(tags="mine", license="mit", model_name="Two tasks")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert {"atm", "model-merging", "mine"} <= set(card.data.tags) and card.data.license == "mit"
    assert "# Two tasks" in card.text and "figures/rounds.png" in card.text
    scores = json.loads((tmp_path / "run" / "atm_report.json").read_text())["rounds"][-1]["scores"]
    assert f"| {scores['a']:.3f} |" in card.text


def test_an_upload_names_the_folder_when_no_id_is_given(hub, tmp_path):
    trainer = run(tmp_path / "my-run", num_rounds=1)
    trainer.push_to_hub()
    assert set(hub.repositories) == {"me/my-run"}
    assert Path(tmp_path / "my-run" / "README.md").is_file()


def test_a_module_without_a_configuration_is_uploaded_with_its_card(hub, tmp_path):
    data = {task: make_data(task, 16) for task in TASKS}
    trainer = make_trainer(
        tmp_path / "own", train_dataset=data, eval_dataset=data, compute_metrics=METRICS, eval_strategy="epoch"
    )
    trainer.train()
    trainer.push_to_hub(license="mit", tags="mine")
    assert {"model.safetensors", "README.md"} <= set(pushed(hub, "me/own"))
    card = ModelCard.load(tmp_path / "own" / "README.md")
    assert {"atm", "mine"} <= set(card.data.tags) and card.data.license == "mit" and "# own" in card.text
    assert 'load_model(model, hf_hub_download("me/own", "model.safetensors"))' in card.text
    copy = TinyModel()
    load_model(copy, hf_hub_download("me/own", "model.safetensors"))
    assert largest_difference(parameters_of(copy), parameters_of(trainer.model)) == 0.0
