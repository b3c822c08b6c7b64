from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForTokenClassification,
    GPTNeoConfig,
    GPTNeoForSequenceClassification,
)

from hf_atm.merging.layout import transposed_keys


def shapes_of(model):
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def test_gpt2_is_stored_input_side_first():
    config = GPT2Config(
        n_embd=8, n_head=2, n_layer=2, vocab_size=20, n_positions=16, add_cross_attention=True, num_labels=3
    )
    with torch.device("meta"):
        model = GPT2ForTokenClassification(config)
    found = transposed_keys(shapes_of(model))
    expected = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    # Square ones among them, which only their neighbours tell apart.
    assert "transformer.h.1.attn.c_proj.weight" in found and "transformer.h.1.crossattention.q_attn.weight" in found
    assert found == expected
    assert "classifier.weight" in shapes_of(model) and len(expected) == 14


@pytest.mark.parametrize("family", ["bert", "neo"])
def test_other_models_are_not(family):
    with torch.device("meta"):
        if family == "bert":
            sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
        else:
            # Names like GPT-2's, layout like everybody's.
            config = GPTNeoConfig(
                hidden_size=8, num_heads=2, num_layers=1, attention_types=[[["global"], 1]], vocab_size=20
            )
            model = GPTNeoForSequenceClassification(config)
    assert transposed_keys(shapes_of(model)) == frozenset()


def test_patterns_overrule_the_shapes():
    shapes = {"a.weight": torch.Size((3, 4)), "a.bias": torch.Size((4,)), "b.weight": torch.Size((4, 4))}
    assert transposed_keys(shapes) == {"a.weight", "b.weight"}
    assert transposed_keys(shapes, ["b.*"]) == {"b.weight"}
    assert transposed_keys(shapes, []) == frozenset()
    # Without biases nothing can be told.
    assert transposed_keys({"a.weight": torch.Size((3, 4))}) == frozenset()
