from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_atm.merging import collect_fisher, merge_state_dicts


def collect(model, batches, num_examples=None, **kwargs):
    return collect_fisher(model, batches, num_examples, disable_tqdm=True, **kwargs)


def near(left, right, tolerance=1e-5):
    torch.testing.assert_close(left, right.to(left.dtype), rtol=tolerance, atol=tolerance * 1e-2)


def linear(labels, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, labels).double(), torch.randn(6, 4, dtype=torch.float64)


def tiny_bert(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes, **kwargs))


def test_softmax_regression_in_closed_form():
    """For one linear layer F = mean_x p_i (1 - p_i) x_j**2: the variance of the label's indicator times the input."""
    model, data = linear(3)
    probabilities = model(data).softmax(dim=-1).detach()
    spread = probabilities * (1 - probabilities)
    found = collect(model, data.split(4))
    near(found["weight"], spread.T @ data.square() / 6, 1e-10)
    near(found["bias"], spread.mean(dim=0), 1e-10)
    assert found["weight"].dtype == torch.float64


def test_several_labels_and_regression_in_closed_form():
    model, data = linear(3)
    probabilities = model(data).sigmoid().detach()
    found = collect(model, [data], problem_type="multi_label_classification")
    near(found["weight"], (probabilities * (1 - probabilities)).T @ data.square() / 6, 1e-10)
    found = collect(model, [data], problem_type="regression")
    near(found["weight"], data.square().mean(dim=0).expand(3, 4), 1e-10)
    single, _ = linear(1)
    near(collect(single, [data])["weight"], data.square().mean(dim=0)[None], 1e-10)


def test_the_expectation_is_that_of_all_labels_one_by_one():
    model = tiny_bert(num_labels=3)
    batch = {"input_ids": torch.tensor([[3, 5, 7], [2, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    found = collect(model, [batch])
    expected = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    model.eval()
    for row in range(2):
        for label in range(3):
            example = {key: value[row : row + 1] for key, value in batch.items()}
            model.zero_grad()
            output = model(**example, labels=torch.tensor([label]))
            output.loss.backward()
            share = float(output.logits.softmax(dim=-1)[0, label].detach()) / 2
            for name, value in model.named_parameters():
                expected[name] += share * value.grad.double().square()
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        near(found[name], value, 1e-4)
        assert found[name].dtype == torch.float32 and not found[name].requires_grad


def test_draws_approach_the_expectation_and_follow_the_seed():
    model, data = linear(3)
    exact = collect(model, [data])["weight"]
    drawn = collect(model, [data], num_samples=600)["weight"]
    assert float((drawn - exact).norm() / exact.norm()) < 0.1
    assert torch.equal(drawn, collect(model, data.split(1), num_samples=600)["weight"])
    assert not torch.equal(drawn, collect(model, [data], num_samples=600, seed=1)["weight"])


def test_given_labels_are_the_squared_gradients_of_the_loss():
    model = tiny_bert(num_labels=3).eval()
    batch = {"input_ids": torch.tensor([[3, 5, 7], [2, 4, 6]]), "labels": torch.tensor([0, 2])}
    found = collect(model, [batch], labels="given")
    expected = 0
    for row in range(2):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        expected = expected + model.classifier.weight.grad.square() / 2
    near(found["classifier.weight"], expected)
    with pytest.raises(ValueError, match="no loss.*put labels"):
        collect(model, [{"input_ids": batch["input_ids"]}], labels="given")


def test_language_models_draw_each_token_once_without_padding():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=16))
    short = {"input_ids": torch.tensor([[3, 5]]), "attention_mask": torch.tensor([[1, 1]])}
    padded = {"input_ids": torch.tensor([[3, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    left, right = collect(model, [short]), collect(model, [padded])
    for key in left:
        near(right[key], left[key], 1e-3)
    # Tied weights are measured together and named apart.
    assert torch.equal(left["lm_head.weight"], left["transformer.wte.weight"])
    assert left["lm_head.weight"].data_ptr() != left["transformer.wte.weight"].data_ptr()
    assert all(bool((value >= 0).all()) for value in left.values())


def test_decoders_beside_encoders_go_by_their_own_padding():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, pad_token_id=0, **sizes))
    source = {"input_ids": torch.tensor([[3, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    left = collect(model, [{**source, "labels": torch.tensor([[4, 6, 2]])}])
    right = collect(model, [{**source, "labels": torch.tensor([[4, 6, 2, -100]])}])
    for key in left:
        near(right[key], left[key], 1e-3)


def test_frozen_parameters_are_left_out_and_merged_by_the_mean():
    models = [tiny_bert(num_labels=2) for _ in range(2)]
    for model in models:
        model.bert.embeddings.requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = {"input_ids": torch.tensor([[3, 5, 7]])}
    statistics = [collect(model, [batch]) for model in models]
    assert not any("embeddings" in key for key in statistics[0])
    merged = merge_state_dicts(models, method="fisher", statistics=statistics)
    mean = merge_state_dicts(models)
    same = {key for key in mean if torch.equal(mean[key], merged[key])}
    assert {key for key in mean if "embeddings" in key} <= same and "classifier.weight" not in same


def test_number_of_examples_modes_and_gradients():
    model, data = linear(3)
    dropped = nn.Sequential(nn.Dropout(0.5), model).train()
    few = collect(dropped, data.split(4), 5)
    near(few["1.weight"], collect(model, [data[:5]])["weight"], 1e-12)
    assert dropped.training and dropped[0].training and model.weight.grad is None
    with torch.no_grad():
        near(collect(model, [data])["weight"], collect(model, data.split(1))["weight"], 1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "mine"}, ["labels='mine'", "'given'"]),
        ({"num_samples": 0}, ["num_samples=0"]),
        ({"num_examples": 0}, ["num_examples=0"]),
        ({"problem_type": "ranking"}, ["'ranking'", "regression"]),
    ],
)
def test_bad_options(options, words):
    model, data = linear(3)
    with pytest.raises(ValueError) as error:
        collect(model, [data], **options)
    assert all(word in str(error.value) for word in words)


def test_bad_input():
    model, data = linear(3)
    with pytest.raises(ValueError, match="no batch"):
        collect(model, [])
    with pytest.raises(ValueError, match="requires a gradient"):
        collect(model.requires_grad_(False), [data])

    class Silent(nn.Linear):
        def forward(self, values):
            return {"states": super().forward(values)}

    with pytest.raises(ValueError, match="without logits"):
        collect(Silent(4, 2).double(), [data])
