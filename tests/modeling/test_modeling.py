from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from modeling_families import make_backbone, make_inputs, shake
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from hf_atm import MultiTaskConfig, MultiTaskModel


TASKS = {"sst2": {"num_labels": 2}, "stsb": {"num_labels": 1}, "mnli": {"num_labels": 3}}
LABELS = {
    "sst2": torch.tensor([0, 1, 1, 0]),
    "stsb": torch.tensor([0.0, 1.0, 2.0, 0.5]),
    "mnli": torch.tensor([2, 1, 0, 0]),
}


def make_model(name="bert", **kwargs):
    return MultiTaskModel.from_backbone(make_backbone(name), TASKS, **kwargs)


def test_task_must_be_named_unless_there_is_one():
    model, inputs = make_model(), make_inputs("bert")
    with pytest.raises(ValueError, match="pass task=, one of: sst2, stsb, mnli"):
        model(**inputs)
    with pytest.raises(KeyError, match="unknown task 'cola'; the model knows: sst2, stsb, mnli"):
        model(**inputs, task="cola")
    with pytest.raises(KeyError, match="unknown task 'cola'"):
        model.to_task_model("cola")
    single = MultiTaskModel.from_backbone(make_backbone("bert"), {"sst2": {"num_labels": 2}})
    assert torch.equal(single(**inputs).logits, single(**inputs, task="sst2").logits)


def test_signature_keeps_columns_and_trainer_attributes():
    names = inspect.signature(MultiTaskModel.forward).parameters
    assert {"input_ids", "attention_mask", "token_type_ids", "pixel_values", "labels", "task"} <= set(names)
    assert make_model().accepts_loss_kwargs is False
    assert make_model("vit").main_input_name == "pixel_values" and make_model().main_input_name == "input_ids"


def test_head_parameters_are_all_under_their_task():
    model = make_model("roberta")
    for name, _ in model.named_parameters():
        assert name.startswith("backbone.") or name.split(".")[:2] in [["heads", task] for task in TASKS]
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("heads.")} == set(TASKS)


def test_idle_heads_get_no_gradient():
    model = make_model()
    model(**make_inputs("bert"), labels=LABELS["mnli"], task="mnli").loss.backward()
    assert all(p.grad is None for task in ("sst2", "stsb") for p in model.heads[task].parameters())
    assert all(p.grad is not None for p in [*model.heads["mnli"].parameters(), *model.backbone.parameters()])


def test_loss_ignores_num_items_in_batch_and_tuple_output():
    model, inputs = make_model(), make_inputs("bert")
    output = model(**inputs, labels=LABELS["stsb"], task="stsb")
    assert torch.equal(output.loss, nn.functional.mse_loss(output.logits[:, 0], LABELS["stsb"]))
    again = model(**inputs, labels=LABELS["stsb"], task="stsb", num_items_in_batch=torch.tensor(16))
    assert torch.equal(output.loss, again.loss)
    loss, logits = model(**inputs, labels=LABELS["stsb"], task="stsb", return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2", "vit"])
def test_activation_checkpointing_changes_no_gradient(name):
    model, inputs = make_model(name).train(), make_inputs(name)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.backbone.modules())
        torch.manual_seed(0)
        model(**inputs, labels=LABELS["mnli"], task="mnli").loss.backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stock_code_sees_the_training_mode():
    model = make_model()
    assert not model.heads["mnli"].shell(model.backbone).training
    assert model.train().heads["mnli"].shell(model.backbone).training


def test_copies_are_independent():
    model = make_model("roberta", seed=1)
    inputs = make_inputs("roberta")
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            expected = model(**inputs, task="mnli").logits
            assert torch.equal(clone(**inputs, task="mnli").logits, expected)
            shake(clone)
            assert torch.equal(model(**inputs, task="mnli").logits, expected)
            assert not torch.equal(clone(**inputs, task="mnli").logits, expected)


def test_batch_norm_statistics_move_and_are_saved(tmp_path):
    model, inputs = make_model("resnet").train(), make_inputs("resnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(**inputs, task="mnli")
    assert all(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    model.eval().save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    assert all(torch.equal(dict(loaded.named_buffers())[name], buffer) for name, buffer in model.named_buffers())
    assert (model.to_task_model("mnli")(**inputs).logits - model(**inputs, task="mnli").logits).abs().max() <= 1e-6


def test_activation_checkpointing_is_the_backbones_to_offer():
    with pytest.raises(ValueError, match="does not support"):
        make_model("convnext").activation_checkpointing_enable()


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_compiles_to_one_graph(name):
    model, inputs = make_model(name), make_inputs(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs, task="mnli").logits, model(**inputs, task="mnli").logits)
    torch.compiler.reset()


def test_peft_trains_adapters_and_one_head():
    model, inputs = make_model("roberta"), make_inputs("roberta")
    with torch.no_grad():
        expected = {task: model(**inputs, task=task).logits for task in TASKS}
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=[f"heads.{task}" for task in TASKS])
    peft_model = get_peft_model(model, config)
    for task in TASKS:
        assert torch.equal(peft_model(**inputs, task=task).logits, expected[task])
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.to_task_model("mnli")
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        peft_model(**inputs, labels=LABELS["mnli"], task="mnli").loss.backward()
        optimizer.step()
    trained = peft_model(**inputs, task="mnli").logits
    assert (trained - expected["mnli"]).abs().max() > 1e-3
    merged = peft_model.merge_and_unload()
    assert (merged(**inputs, task="mnli").logits - trained).abs().max() < 1e-5
    assert (merged.to_task_model("mnli")(**inputs).logits - trained).abs().max() < 1e-5


def test_plain_trainer_runs_on_one_task(tmp_path):
    model, inputs = make_model(), make_inputs("bert")
    rows = [{key: value[row] for key, value in inputs.items()} | {"labels": LABELS["sst2"][row]} for row in range(4)]

    def collate(batch):
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]} | {"task": "sst2"}

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    before = model.heads["sst2"].classifier.weight.detach().clone()
    trainer.train()
    assert trainer.predict(rows).predictions.shape == (4, 2)
    assert not torch.equal(before, model.heads["sst2"].classifier.weight)


# Explicit pooling, each against its formula in plain torch.


def plain(pooling, outputs, mask):
    hidden = outputs.last_hidden_state
    lengths = mask.sum(1).tolist() if mask is not None else None
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "pooler":
        return outputs.pooler_output.reshape(len(hidden), -1)
    if pooling == "mean":
        return torch.stack([row[:n].sum(0) / n for row, n in zip(hidden, lengths, strict=True)])
    if pooling == "last_token":
        return torch.stack([row[n - 1] for row, n in zip(hidden, lengths, strict=True)])
    return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert", "cls"),
        ("bert", "mean"),
        ("bert", "pooler"),
        ("gpt2", "mean"),
        ("gpt2", "last_token"),
        ("vit", "cls"),
        ("vit", "pooler"),
        ("vit", "image_pool"),
        ("resnet", "image_pool"),
        ("resnet", "pooler"),
        ("convnext", "image_pool"),
    ],
)
def test_explicit_pooling(name, pooling, tmp_path):
    backbone = make_backbone(name)
    reference = copy.deepcopy(backbone)
    model = MultiTaskModel.from_backbone(backbone, TASKS, pooling=pooling)
    inputs = make_inputs(name)
    with torch.no_grad():
        features = plain(pooling, reference(**inputs), inputs.get("attention_mask"))
        head = model.heads["mnli"].classifier
        expected = nn.functional.linear(features, head.weight, head.bias)
        assert (model(**inputs, task="mnli").logits - expected).abs().max() <= 1e-6
    model.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="pooling=None"):
        model.to_task_model("mnli")


def test_pooling_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match="choose pooler or image_pool"):
        make_model("resnet", pooling="cls")(**make_inputs("resnet"), task="mnli")
    with pytest.raises(ValueError, match="gives no pooler_output"):
        make_model("gpt2", pooling="pooler")(**make_inputs("gpt2"), task="mnli")


def test_without_tasks_there_is_only_a_backbone():
    backbone = AutoModel.from_config(make_backbone("bert").config)
    model = MultiTaskModel(MultiTaskConfig(), backbone=backbone)
    assert len(model.heads) == 0
    assert model.config.backbone_config is backbone.config
    with pytest.raises(ValueError, match="one of: none"):
        model(**make_inputs("bert"))
