"""The oracle: plain transformers classification models, built and run without hf_atm."""

from __future__ import annotations

import copy

import pytest
import torch
from modeling_families import FAMILIES, make_backbone, make_inputs, shake
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_atm import MultiTaskModel


TASKS = {"first": {"num_labels": 3}, "second": {"num_labels": 1}}
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
# Our forward runs the very code of the stock class, so this is rounding at most.
EXACT = 1e-6


def stock_model(name, num_labels=3, seed=0):
    """A stock classifier, made the way a user of plain transformers makes it."""
    config = FAMILIES[name].config()
    if name.endswith("_vision_model"):
        parent = FAMILIES[name].stock_class.config_class
        config = parent(vision_config=config.to_dict())
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shake(FAMILIES[name].stock_class(config)).eval()


def copy_head(stock, model, task):
    """Writes a stock classifier's head into a task, by parameter name."""
    model.heads[task].load_state_dict(
        {k: v for k, v in stock.state_dict().items() if k in model.heads[task].state_dict()}
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_a_stock_model_with_the_same_weights(name):
    stock = stock_model(name)
    model = MultiTaskModel.from_backbone(copy.deepcopy(stock), TASKS)
    copy_head(stock, model, "first")
    inputs = make_inputs(name)
    with torch.no_grad():
        expected, actual = stock(**inputs).logits, model(**inputs, task="first").logits
        other = model(**inputs, task="second").logits
    assert expected.std(0).min() > 1e-4 and expected.std(1).min() > 1e-4  # the oracle tells examples and classes apart
    assert (actual - expected).abs().max() <= EXACT
    assert other.shape == (4, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_stock_and_reloads_with_equal_logits(name, tmp_path):
    tasks = {
        "first": {"label2id": {"no": 0, "yes": 1, "maybe": 2}, "problem_type": "single_label_classification"},
        "second": {"num_labels": 1},
    }
    model = shake(MultiTaskModel.from_backbone(make_backbone(name), tasks))
    inputs = make_inputs(name)
    images = "Image" in FAMILIES[name].stock
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    for task in tasks:
        export = model.to_task_model(task)
        assert type(export) is FAMILIES[name].stock_class
        export.save_pretrained(tmp_path / task)
        reloaded, info = auto.from_pretrained(tmp_path / task, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            expected = model(**inputs, task=task).logits
            assert (export(**inputs).logits - expected).abs().max() <= EXACT
            assert (reloaded(**inputs).logits - expected).abs().max() <= EXACT
    config = model.to_task_model("first").config
    assert config.id2label == {0: "no", 1: "yes", 2: "maybe"} and config.label2id["maybe"] == 2
    assert config.num_labels == 3 and config.problem_type == "single_label_classification"
    assert model.to_task_model("second").config.problem_type == "regression"


def test_export_is_a_copy():
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS)
    export = model.to_task_model("first")
    before = {name: tensor.clone() for name, tensor in export.state_dict().items()}
    shake(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in export.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_export_moves_no_random_numbers(name):
    model = MultiTaskModel.from_backbone(make_backbone(name), TASKS)
    state = torch.random.get_rng_state()
    model.to_task_model("first")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("mask", [True, False])
def test_right_padding_equals_stock_and_single_sequences(name, mask):
    stock = stock_model(name)
    model = MultiTaskModel.from_backbone(copy.deepcopy(stock), TASKS)
    copy_head(stock, model, "first")
    inputs = make_inputs(name, mask=mask)
    with torch.no_grad():
        logits = model(**inputs, task="first").logits
        assert (logits - stock(**inputs).logits).abs().max() <= EXACT
        for row, length in enumerate((7, 5, 4, 2)):
            alone = stock(input_ids=inputs["input_ids"][row : row + 1, :length]).logits[0]
            assert (logits[row] - alone).abs().max() <= 1e-5  # other matrix shapes, other rounding


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_equals_unpadded_sequences(name):
    stock = stock_model(name)
    model = MultiTaskModel.from_backbone(copy.deepcopy(stock), TASKS)
    copy_head(stock, model, "first")
    inputs = make_inputs(name, left=True)
    with torch.no_grad():
        logits = model(**inputs, task="first").logits
        for row, length in enumerate((7, 5, 4, 2)):
            alone = stock(input_ids=inputs["input_ids"][row : row + 1, -length:]).logits[0]
            assert (logits[row] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("left", [False, True])
def test_last_token_is_the_masks_even_if_it_is_the_padding_token(left):
    """GPT-2 users pad with the end-of-text token, which may also end the text."""
    backbone = make_backbone("gpt2")
    backbone.config.pad_token_id = 2
    model = MultiTaskModel.from_backbone(backbone, TASKS)
    inputs = make_inputs("gpt2", left=left)
    inputs["input_ids"][inputs["attention_mask"] == 0] = 2
    with torch.no_grad():
        logits = model(**inputs, task="first").logits
        for row, length in enumerate((7, 5, 4, 2)):
            tokens = inputs["input_ids"][row, -length:] if left else inputs["input_ids"][row, :length]
            hidden = model.backbone(input_ids=tokens[None]).last_hidden_state[0, -1]
            assert (logits[row] - model.heads["first"].score(hidden)).abs().max() <= 1e-5


def test_decoder_without_padding_token():
    backbone = make_backbone("llama")
    backbone.config.pad_token_id = None
    model = MultiTaskModel.from_backbone(backbone, TASKS)
    inputs = make_inputs("llama")
    with torch.no_grad():
        expected = model(**inputs, task="first").logits
        one = model(input_ids=inputs["input_ids"][:1], task="first").logits
        assert (one - expected[:1]).abs().max() <= 1e-5
        assert (model.to_task_model("first", pad_token_id=0)(**inputs).logits - expected).abs().max() <= EXACT
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=inputs["input_ids"], task="first")


def test_inputs_embeds():
    for name in ("bert", "llama"):
        model = MultiTaskModel.from_backbone(make_backbone(name), TASKS)
        inputs = make_inputs(name)
        with torch.no_grad():
            expected = model(**inputs, task="first").logits
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            assert (model(inputs_embeds=embeds, **inputs, task="first").logits - expected).abs().max() <= EXACT


def test_inputs_the_family_lacks_are_dropped():
    """A data set prepared with another tokenizer may carry token_type_ids."""
    for name in ("distilbert", "mpnet", "llama"):
        model = MultiTaskModel.from_backbone(make_backbone(name), TASKS)
        inputs = make_inputs(name)
        with torch.no_grad():
            expected = model(**inputs, task="first").logits
            actual = model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]), task="first").logits
        assert torch.equal(actual, expected)


def test_token_types_are_used_where_the_family_has_them():
    stock = stock_model("bert")
    model = MultiTaskModel.from_backbone(copy.deepcopy(stock), TASKS)
    copy_head(stock, model, "first")
    inputs = make_inputs("bert")
    types = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        plain, typed = (model(**inputs, task="first", **extra).logits for extra in ({}, {"token_type_ids": types}))
        assert (typed - stock(**inputs, token_type_ids=types).logits).abs().max() <= EXACT
    assert (plain - typed).abs().max() > 1e-3


def test_training_mode_draws_the_stock_models_dropout():
    stock = stock_model("roberta").train()
    model = MultiTaskModel.from_backbone(copy.deepcopy(stock), TASKS).train()
    copy_head(stock, model, "first")
    inputs = make_inputs("roberta")
    torch.manual_seed(5)
    expected = stock(**inputs).logits
    torch.manual_seed(5)
    assert torch.equal(model(**inputs, task="first").logits, expected)
    assert not torch.equal(model(**inputs, task="first").logits, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "resnet"])
def test_gradients_equal_the_stock_models(name):
    stock = stock_model(name)
    model = MultiTaskModel.from_backbone(copy.deepcopy(stock), TASKS)
    copy_head(stock, model, "first")
    inputs, labels = make_inputs(name), torch.tensor([0, 2, 1, 1])
    expected, actual = stock(**inputs, labels=labels).loss, model(**inputs, labels=labels, task="first").loss
    assert (expected - actual).abs() <= EXACT
    expected.backward()
    actual.backward()
    prefix = stock.base_model_prefix
    grads = {n: p.grad for n, p in stock.named_parameters()}
    seen = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith("heads.second."):
            assert parameter.grad is None
            continue
        other = grads[parameter_name.replace("backbone.", f"{prefix}.", 1).removeprefix("heads.first.")]
        assert (parameter.grad - other).abs().max() <= 1e-5
        seen += 1
    assert seen == len(grads)
