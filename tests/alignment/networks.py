"""Small real architectures with random weights, and inputs for them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)


_ENCODER = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
_DECODER = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "head_dim": 4,
}


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.Linear(inner, outer), *([nn.ReLU()] if index < len(sizes) - 2 else [])]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A residual block; `norm` makes the norm over some channels."""

    def __init__(self, inner: int, outer: int, stride: int, norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), norm(outer)
        self.conv2, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), norm(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(hidden + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of residual blocks, as on CIFAR; depth 20 has three blocks per stage."""

    def __init__(self, norm=nn.BatchNorm2d, width: int = 16, blocks: int = 3, labels: int = 10) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width)
        inner = width
        for stage in range(3):
            outer = width * 2**stage
            layers = []
            for index in range(blocks):
                layers.append(Block(inner, outer, 2 if stage and not index else 1, norm))
                inner = outer
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(inner, labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def vgg() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


def one_group(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels)


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(4, 3, size, size)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 30, (4, 9))}


TRANSFORMERS = {
    "bert": lambda: (BertForSequenceClassification(BertConfig(**_ENCODER)), tokens()),
    "bert masked": lambda: (BertForMaskedLM(BertConfig(**_ENCODER)), tokens()),
    "roberta": lambda: (RobertaForSequenceClassification(RobertaConfig(**_ENCODER)), tokens()),
    "distilbert": lambda: (
        DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=30, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=24)
        ),
        tokens(),
    ),
    "vit": lambda: (
        ViTForImageClassification(
            ViTConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                intermediate_size=40,
                image_size=16,
                patch_size=4,
            )
        ),
        {"pixel_values": images()},
    ),
    "gpt2": lambda: (
        GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=24, n_layer=2, n_head=3, n_positions=24)),
        tokens(),
    ),
    "llama": lambda: (LlamaForCausalLM(LlamaConfig(**_DECODER)), tokens()),
    "mistral": lambda: (MistralForCausalLM(MistralConfig(**_DECODER)), tokens()),
    "qwen3": lambda: (Qwen3ForCausalLM(Qwen3Config(**_DECODER)), tokens()),
    "resnet": lambda: (
        ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=5)
        ),
        {"pixel_values": images(32)},
    ),
}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with every parameter and statistic at random, so that nothing hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise + value)
    return model.eval()
