"""The loop around the multi-task model: real architectures, private modules, exports."""

from __future__ import annotations

import copy
import json

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
)

from hf_atm import ATMCallback, MultiTaskModel, TaskDataset
from tests.testing_utils import accuracy, largest_difference, make_trainer, parameters_of


SPECS = {"polar": {"num_labels": 2}, "score": {"num_labels": 1}, "topic": {"num_labels": 4}}


def bert(dropout=0.0):
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    return MultiTaskModel.from_backbone(BertModel(config), SPECS, seed=0)


def text(task, size=16):
    generator = torch.Generator().manual_seed(len(task))
    ids = torch.randint(1, 32, (size, 6), generator=generator)
    labels = SPECS[task]["num_labels"]
    target = ids[:, 0].float() / 32 if labels == 1 else ids[:, 0] % labels
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "label": target.tolist()}
    if labels > 1:
        features = datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int64")),
                "attention_mask": datasets.List(datasets.Value("int64")),
                "label": datasets.ClassLabel(names=[f"class {i}" for i in range(labels)]),
            }
        )
        return datasets.Dataset.from_dict(columns, features=features)
    return datasets.Dataset.from_dict(columns)


def texts(size=16):
    return {task: text(task, size) for task in SPECS}


def test_a_run_ends_in_stock_models_with_equal_logits(tmp_path):
    trainer = make_trainer(tmp_path / "run", bert(dropout=0.1), train_dataset=texts(), num_rounds=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "merged"))
    loaded = MultiTaskModel.from_pretrained(tmp_path / "merged")
    assert largest_difference(parameters_of(loaded), parameters_of(trainer.model)) == 0.0
    ids = torch.randint(1, 32, (3, 6))
    for task in SPECS:
        loaded.to_task_model(task).save_pretrained(tmp_path / task)
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / task).eval()
        with torch.no_grad():
            expected = trainer.model.eval()(input_ids=ids, task=task).logits
            assert (stock(input_ids=ids).logits - expected).abs().max() <= 1e-6


def test_gradient_accumulation_changes_nothing(tmp_path):
    whole = make_trainer(tmp_path / "a", bert(), train_dataset=texts(), num_rounds=1, logging_steps=1)
    whole.train()
    parts = make_trainer(
        tmp_path / "b",
        bert(),
        train_dataset=texts(),
        num_rounds=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    parts.train()
    norms = [[log["grad_norm"] for log in t.state.log_history if "grad_norm" in log] for t in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert largest_difference(parameters_of(whole.model), parameters_of(parts.model)) <= 1e-5


@pytest.mark.parametrize("mode", ["delta", "svd", "adapter"])
def test_an_adapter_trains_with_its_heads(tmp_path, mode):
    trainer = make_trainer(
        tmp_path / "run",
        bert(),
        train_dataset=texts(),
        num_rounds=2,
        learning_rate=0.2,
        lora_merge_mode=mode,
        peft_config=LoraConfig(r=2, target_modules=["query", "value"]),
    )
    before = parameters_of(trainer.model)
    trainer.train()
    after = parameters_of(trainer.model)
    assert any("heads.topic" in name and not torch.equal(before[name], after[name]) for name in after)
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.randint(1, 32, (3, 6))
    with torch.no_grad():
        expected = {task: trainer.model.eval()(input_ids=ids, task=task).logits for task in SPECS}
    if mode == "delta":
        loaded = MultiTaskModel.from_pretrained(tmp_path / "saved").eval()
    else:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(bert(), str(tmp_path / "saved")).eval()
    for task in SPECS:
        with torch.no_grad():
            assert (loaded(input_ids=ids, task=task).logits - expected[task]).abs().max() <= 1e-5


def test_private_modules_train_in_their_own_segments_only(tmp_path):
    private = {}

    class Watch(ATMCallback):
        def on_task_begin(self, args, state, control, *, task, model, **kwargs):
            self.before = copies(model)

        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            after = copies(model)
            for name, value in after.items():
                changed = not torch.equal(value, self.before[name])
                assert changed == (name.split(".")[1] == task), name
            private[task] = {name: value for name, value in after.items() if name.split(".")[1] == task}

    def copies(model):
        return {n: v.clone() for n, v in model.state_dict().items() if n.startswith("task_specific.")}

    settings = {
        "train_dataset": texts(),
        "eval_dataset": texts(8),
        "compute_metrics": dict.fromkeys(SPECS, lambda prediction: {"n": float(len(prediction.label_ids))}),
        "task_specific_modules": ["LayerNorm"],
        "num_rounds": 2,
        "learning_rate": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    trainer = make_trainer(
        tmp_path / "run", bert(), callbacks=[Watch()], save_strategy="steps", save_steps=3, **settings
    )
    trainer.train()
    final = parameters_of(trainer.model)
    for values in private.values():
        for name, value in values.items():
            assert torch.equal(final[name], value)
    assert not any("LayerNorm" in name for name in trainer.base_state)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = MultiTaskModel.from_pretrained(tmp_path / "saved").eval()
    kept = loaded.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in trainer.model.state_dict().items())
    ids = torch.randint(1, 32, (3, 6))
    for task in SPECS:
        with torch.no_grad():
            expected = trainer.model.eval()(input_ids=ids, task=task).logits
            # Where weights lie in memory may change the last digit of a product.
            assert torch.allclose(loaded(input_ids=ids, task=task).logits, expected, atol=1e-6)
    for step in (3, 6, 9):
        resumed = make_trainer(tmp_path / f"resumed-{step}", bert(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        found = parameters_of(resumed.model)
        assert all(torch.equal(found[n], final[n]) for n in final if n.startswith(("task_specific", "heads")))
        for task in SPECS:
            with torch.no_grad():
                expected = trainer.model.eval()(input_ids=ids, task=task).logits
                assert torch.equal(resumed.model.eval()(input_ids=ids, task=task).logits, expected)


def test_private_modules_beside_an_adapter(tmp_path):
    settings = {
        "train_dataset": texts(),
        "task_specific_modules": ["LayerNorm"],
        "peft_config": LoraConfig(r=2, target_modules=["query", "value"]),
        "num_rounds": 2,
        "learning_rate": 0.2,
        "save_strategy": "steps",
        "save_steps": 3,
        "push_to_hub": False,
    }
    start = parameters_of(bert())
    trainer = make_trainer(tmp_path / "run", bert(), **settings)
    assert not any("LayerNorm" in name for name in trainer.atm.groups.shared)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = MultiTaskModel.from_pretrained(tmp_path / "saved").eval()
    stored = loaded.state_dict()
    copies = [name for name in stored if name.startswith("task_specific.") and name.endswith("/weight")]
    assert len(copies) == len(SPECS) * sum("LayerNorm.weight" in name for name in start)
    first, second = sorted(SPECS)[:2]
    pairs = [(stored[n], stored[n.replace(f".{first}.", f".{second}.")]) for n in copies if f".{first}." in n]
    assert all(not torch.equal(a, b) for a, b in pairs)
    ids = torch.randint(1, 32, (3, 6))
    for task in SPECS:
        with torch.no_grad():
            expected = trainer.model.eval()(input_ids=ids, task=task).logits
            assert (loaded(input_ids=ids, task=task).logits - expected).abs().max() <= 1e-5
    for step in (3, 6, 9):
        resumed = make_trainer(tmp_path / f"resumed-{step}", bert(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        resumed.save_model(str(tmp_path / f"saved-{step}"))
        again = MultiTaskModel.from_pretrained(tmp_path / f"saved-{step}").state_dict()
        assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_what_is_private_cannot_carry_the_adapter(tmp_path):
    settings = {
        "train_dataset": texts(),
        "task_specific_modules": ["layer.1"],
        "peft_config": LoraConfig(r=2, target_modules=["query"]),
    }
    with pytest.raises(ValueError, match="query.*is private by task_specific_modules and a target of the adapter"):
        make_trainer(tmp_path, bert(), **settings)
    with pytest.raises(ValueError, match="need lora_merge_mode='delta'"):
        make_trainer(tmp_path, bert(), **settings, lora_merge_mode="svd")


def test_private_sizes_are_reported_and_on_the_card(tmp_path):
    trainer = make_trainer(
        tmp_path, bert(), train_dataset=texts(), task_specific_modules=["LayerNorm"], num_rounds=1, head_steps=1
    )
    trainer.train()
    report = json.loads((tmp_path / "atm_report.json").read_text())
    size = sum(p.numel() for name, p in bert().named_parameters() if "LayerNorm" in name)
    heads = {task: sum(p.numel() for p in bert().heads[task].parameters()) for task in SPECS}
    assert report["private_parameters"] == {task: {"head": heads[task], "modules": size} for task in SPECS}
    trainer.save_model()
    trainer.create_model_card()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## What each task keeps to itself") == 1
    for task in SPECS:
        assert f"| {task} | {heads[task]:,} | {size:,} |" in card
    assert "match `LayerNorm`" in card


def test_convolutional_models_with_private_and_shared_statistics(tmp_path):
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    specs = {"a": {"num_labels": 2}, "b": {"num_labels": 2}}
    model = MultiTaskModel.from_backbone(ResNetModel(config), specs, seed=0)
    data = {
        task: datasets.Dataset.from_dict(
            {"pixel_values": torch.rand(16, 3, 16, 16).tolist(), "labels": [i % 2 for i in range(16)]}
        ).with_format("torch")
        for task in specs
    }
    trainer = make_trainer(tmp_path / "run", copy.deepcopy(model), train_dataset=data, num_rounds=1)
    assert len(trainer.atm.rounds.statistics) > 0
    trainer.train()
    trainer.model.to_task_model("a").save_pretrained(tmp_path / "stock")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "stock").eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=pixels, task="a").logits
        assert (stock(pixel_values=pixels).logits - expected).abs().max() <= 1e-5
    private = make_trainer(
        tmp_path / "private", model, train_dataset=data, num_rounds=1, task_specific_modules=["normalization"]
    )
    assert private.atm.rounds.statistics == {}
    private.train()
    stored = private.model.state_dict()
    names = [name for name in stored if name.startswith("task_specific.a.") and name.endswith("running_mean")]
    assert names and any(not torch.equal(stored[n], stored[n.replace("specific.a", "specific.b")]) for n in names)


def test_a_causal_language_model_needs_no_heads(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    data = {}
    for start, task in enumerate(("up", "down")):
        ids = torch.randint(1, 32, (16, 8), generator=torch.Generator().manual_seed(start))
        data[task] = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trainer = make_trainer(
        tmp_path / "run", model, train_dataset=data, eval_dataset=data, num_rounds=2, eval_strategy="epoch"
    )
    trainer.train()
    assert trainer.model_accepts_loss_kwargs
    assert trainer.report[-1]["metrics"]["eval_loss"] < trainer.report[0]["losses"]["up"]
    trainer.save_model(str(tmp_path / "merged"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert largest_difference(parameters_of(loaded), parameters_of(trainer.model)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("topic"), r"train_dataset lacks \['topic'\]; the tasks are"),
        (lambda data: data.update(smell=text("topic")), r"train_dataset has unknown \['smell'\]"),
        (
            lambda data: data.update(polar=text("polar").cast_column("label", datasets.Value("int64")).map(shift)),
            r"polar.*2",
        ),
        (lambda data: data.update(polar=text("topic")), r"'polar'\] has 4 classes.*num_labels=2"),
    ],
    ids=["a task without data", "data without a task", "labels out of range", "another number of classes"],
)
def test_data_that_do_not_fit_the_heads(tmp_path, change, message):
    data = texts()
    change(data)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, bert(), train_dataset=data)


def shift(row):
    return {"label": row["label"] + 1}


def test_prediction_uses_the_tasks_head(tmp_path):
    trainer = make_trainer(tmp_path, bert(), train_dataset=texts(), compute_metrics=accuracy)
    predicted = trainer.predict(TaskDataset(text("topic", 8), "topic"))
    assert predicted.predictions.shape == (8, 4)


def test_resuming_into_another_model(tmp_path):
    trainer = make_trainer(
        tmp_path / "run", bert(), train_dataset=texts(), num_rounds=1, save_strategy="steps", save_steps=2
    )
    trainer.train()
    config = bert().config.backbone_config
    config.hidden_size = 8
    other = MultiTaskModel.from_backbone(BertModel(config), SPECS)
    resumed = make_trainer(tmp_path / "run", other, train_dataset=texts(), num_rounds=1)
    with pytest.raises(ValueError, match="belongs to a different run.*model"):
        resumed.train(resume_from_checkpoint=True)
