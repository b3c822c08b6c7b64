from __future__ import annotations

import copy

import pytest
import torch
from modeling_families import make_backbone, make_inputs, shake
from peft import LoraConfig, get_peft_model

from hf_atm import MultiTaskModel


TASKS = {"a": {"num_labels": 2}, "b": {"num_labels": 3}}
PATTERN = "LayerNorm"


def make_model(name="bert", patterns=(PATTERN,)):
    model = MultiTaskModel.from_backbone(make_backbone(name), TASKS, seed=0)
    model.add_task_specific_modules(list(patterns))
    return model


def private(model):
    return {n: p for n, p in model.named_parameters() if n in set(model.task_specific_parameter_names())}


def train(model, task, name="bert", lr=0.1):
    """One SGD step on all parameters."""
    inputs = make_inputs(name)
    model.zero_grad()
    model(**inputs, labels=torch.tensor([0, 1, 1, 0]), task=task).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad)


def values(model):
    return {name: tensor.detach().clone() for name, tensor in private(model).items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_nothing_changes_before_training():
    plain = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS, seed=0)
    model, inputs = make_model(), make_inputs("bert")
    for task in TASKS:
        assert torch.equal(model(**inputs, task=task).logits, plain(**inputs, task=task).logits)
    names = model.task_specific_parameter_names()
    assert names == [n for n, _ in model.named_parameters() if PATTERN in n and n.startswith("backbone.")]
    assert plain.task_specific_parameter_names() == []


def test_tasks_keep_their_own_values_in_the_same_parameter_objects():
    model = make_model()
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    start = values(model)
    train(model, "a")
    of_a = values(model)
    assert not same(start, of_a)
    model.activate_task("b")
    assert same(values(model), start) and model.active_task == "b"
    train(model, "b", lr=0.3)
    of_b = values(model)
    model.activate_task("a")
    assert same(values(model), of_a)
    model(**make_inputs("bert"), task="b")  # forward activates
    assert same(values(model), of_b)
    assert objects == {name: id(parameter) for name, parameter in model.named_parameters()}


def test_equals_two_models_that_share_by_hand():
    """Oracle: a plain model whose private tensors are swapped from outside."""
    model, plain = make_model(), MultiTaskModel.from_backbone(make_backbone("bert"), TASKS, seed=0)
    names = model.task_specific_parameter_names()
    own = {task: {n: dict(plain.named_parameters())[n].detach().clone() for n in names} for task in TASKS}
    for task in ("a", "b", "b", "a", "b"):
        train(model, task)
        with torch.no_grad():
            for name, value in own[task].items():
                dict(plain.named_parameters())[name].copy_(value)
        train(plain, task)
        own[task] = {n: dict(plain.named_parameters())[n].detach().clone() for n in names}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(plain.named_parameters())[name])


def test_active_task_is_not_copied_again():
    model = make_model()
    model.activate_task("a")
    with torch.no_grad():
        next(iter(private(model).values())).fill_(7)
    model.activate_task("a")
    assert (next(iter(private(model).values())) == 7).all()


def test_state_dict_holds_the_live_values_and_loading_forgets_the_active_task():
    model = make_model()
    train(model, "a")
    of_a = values(model)
    state = copy.deepcopy(model.state_dict())
    fresh = make_model()
    fresh.activate_task("b")
    fresh.load_state_dict(state)
    assert fresh.active_task is None
    inputs = make_inputs("bert")
    with torch.no_grad():
        for task in ("b", "a"):
            assert torch.equal(fresh(**inputs, task=task).logits, model(**inputs, task=task).logits)
    assert same(values(fresh), of_a)


def test_partial_load_loses_no_live_value():
    model = make_model()
    train(model, "a")
    of_a = values(model)
    model.load_state_dict({"heads.a.classifier.bias": torch.zeros(2)}, strict=False)
    model(**make_inputs("bert"), task="a")
    assert same(values(model), of_a)


def test_save_and_load(tmp_path):
    model = make_model()
    train(model, "a")
    train(model, "b", lr=0.3)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded, info = MultiTaskModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.task_specific_modules == [PATTERN] and loaded.active_task is None
    assert loaded.task_specific_parameter_names() == model.task_specific_parameter_names()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    inputs = make_inputs("bert")
    with torch.no_grad():
        for task in TASKS:
            assert torch.equal(loaded(**inputs, task=task).logits, model(**inputs, task=task).logits)


def test_export_uses_the_tasks_copy_and_leaves_the_model_alone():
    model = make_model()
    train(model, "a")
    train(model, "b", lr=0.3)
    inputs = make_inputs("bert")
    exports = {task: model.to_task_model(task) for task in TASKS}
    assert model.active_task == "b"
    with torch.no_grad():
        for task, export in exports.items():
            assert (export(**inputs).logits - model(**inputs, task=task).logits).abs().max() <= 1e-6
    norms = [export.bert.embeddings.LayerNorm.weight for export in exports.values()]
    assert not torch.equal(*norms)


def test_tied_private_weights_export_by_task():
    model = make_model("bart", ["shared"])
    with torch.no_grad():
        for factor, task in enumerate(TASKS, start=2):
            model.activate_task(task)
            model.backbone.shared.weight.mul_(factor)
    inputs = make_inputs("bart")
    with torch.no_grad():
        for task in TASKS:
            export = model.to_task_model(task)
            assert export.model.encoder.embed_tokens.weight is export.model.shared.weight
            assert (export(**inputs).logits - model(**inputs, task=task).logits).abs().max() <= 1e-6


def test_batch_norm_statistics_go_with_their_parameters():
    model = make_model("resnet", ["normalization"]).train()
    inputs = make_inputs("resnet")
    name = "embedder.embedder.normalization.running_mean"
    start = model.backbone.get_buffer(name).clone()
    model(**inputs, task="a")
    moved = model.backbone.get_buffer(name).clone()
    assert not torch.equal(start, moved)
    model.activate_task("b")
    assert torch.equal(model.backbone.get_buffer(name), start)
    model.activate_task("a")
    assert torch.equal(model.backbone.get_buffer(name), moved)
    assert all("running" not in n for n in model.task_specific_parameter_names())


def test_patterns_add_up_and_unknown_ones_raise():
    model = make_model()
    train(model, "a")
    of_a = values(model)
    model.add_task_specific_modules(["backbone.pooler.*", PATTERN])
    assert model.config.task_specific_modules == [PATTERN, "backbone.pooler.*"]
    assert "backbone.pooler.dense.weight" in model.task_specific_parameter_names()
    model.activate_task("b")
    model.activate_task("a")
    assert all(torch.equal(values(model)[name], value) for name, value in of_a.items())
    before = copy.deepcopy(model.config.task_specific_modules)
    with pytest.raises(ValueError, match="'nothing.like.this' matches no parameter"):
        model.add_task_specific_modules(["nothing.like.this"])
    assert model.config.task_specific_modules == before
    with pytest.raises(KeyError, match="unknown task 'c'"):
        model.activate_task("c")


def test_a_new_task_starts_from_the_live_values():
    model = make_model()
    train(model, "a")
    of_a = values(model)
    model.add_task("c", {"num_labels": 2})
    model.activate_task("c")
    assert same(values(model), of_a)
    model.activate_task("b")
    assert not same(values(model), of_a)


def test_copies_keep_their_own_state():
    model = make_model()
    train(model, "a")
    clone = copy.deepcopy(model)
    shake(clone)
    inputs = make_inputs("bert")
    clone.load_state_dict(model.state_dict())
    assert clone.active_task is None and model.active_task == "a"
    with torch.no_grad():
        assert torch.equal(clone(**inputs, task="a").logits, model(**inputs, task="a").logits)


def test_works_under_lora():
    model = make_model("bert", ["query", PATTERN])
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["query"], modules_to_save=[f"heads.{t}" for t in TASKS])
    )
    base = model.backbone.encoder.layer[0].attention.self.query.base_layer.weight
    wrapped(**make_inputs("bert"), task="a")
    with torch.no_grad():
        base.fill_(1)
    wrapped(**make_inputs("bert"), task="b")
    assert not (base == 1).all()
    wrapped(**make_inputs("bert"), task="a")
    assert (base == 1).all()
    live = {name for name, _ in model.named_parameters()}
    assert set(model.task_specific_parameter_names()) <= live
    assert any(name.endswith("query.base_layer.weight") for name in model.task_specific_parameter_names())


def test_distributed_training_leaves_the_copies_out():
    model = make_model()
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name, _ in model.named_buffers() if name.startswith("task_specific.")} and ignored
