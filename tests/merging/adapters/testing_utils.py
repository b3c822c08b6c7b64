"""Tiny real models and random adapters on them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


class Toy(nn.Module):
    """Two matrices of different shape; enough for everything that needs no architecture."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 10, bias=False)
        self.classifier = nn.Linear(10, 3)

    def forward(self, x):
        return self.classifier(self.second(self.first(x)))


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=3, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


# Model, and what its adapters target.
MODELS = {
    "bert": (bert, ["query", "word_embeddings", "dense"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "wpe"]),
    "llama": (llama, ["q_proj", "down_proj", "embed_tokens"]),
    "vit": (vit, ["projection", "fc1", "q_proj"]),
    "toy": (Toy, ["first", "second"]),
}


def base_model(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name][0]().eval()


def adapted(base, seed, targets, **config):
    """A copy of the base with a random adapter, nothing of it zero."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"target_modules": targets, "r": 2, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def pair(model):
    """`(config, state_dict)` of a model's only adapter."""
    return model.peft_config["default"], get_peft_model_state_dict(model, save_embedding_layers=False)


def toy_adapters(count=3, base=None, **changes):
    base = base or base_model("toy")
    return [adapted(base, seed, ["first", "second"], **changes) for seed in range(1, count + 1)]


def weights_of(model):
    return {name: value.detach().double() for name, value in model.state_dict().items()}


def true_update(base, model):
    """By PEFT itself: the folded model minus the base, in float64."""
    model = copy.deepcopy(model).double()
    folded, start = weights_of(model.merge_and_unload()), weights_of(base)
    return {name: folded[name] - start[name] for name in start if not torch.equal(folded[name], start[name])}


def loaded_update(base, folder):
    """The update of a saved adapter, loaded by PEFT, in float64; and what loading had to say."""
    model = PeftModel.from_pretrained(copy.deepcopy(base).double(), str(folder), autocast_adapter_dtype=False)
    return true_update(base, model)


def assert_updates(found, expected, tolerance=1e-6):
    """Equal up to a tolerance relative to the largest entry; names without any update may be left out."""
    for name in sorted({*found, *expected}):
        wanted = expected.get(name)
        if wanted is None:
            assert found[name].abs().max() <= tolerance, name
            continue
        got = found.get(name, torch.zeros_like(wanted)).double()
        assert got.shape == wanted.shape, name
        assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max())), name
