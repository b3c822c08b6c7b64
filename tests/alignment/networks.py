"""Small real architectures with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

from hf_atm import MultiTaskConfig, MultiTaskModel
from hf_atm.alignment import Permutation


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


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PreBlock(nn.Module):
    """A residual block of one width with its norms before the convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


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


def pre_resnet() -> nn.Module:
    model = ResNet(width=8, blocks=2)
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[1] = PreBlock(stage[1].conv1.in_channels)
    return model


def vgg(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        norm(8),
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


_IMAGE = {**{name: _ENCODER[name] for name in list(_ENCODER)[1:5]}, "image_size": 16, "patch_size": 4}
_TASKS: dict[str, dict[str, Any]] = {"a": {"num_labels": 2}, "b": {"num_labels": 3}}


def _distilbert() -> tf.DistilBertConfig:
    return tf.DistilBertConfig(vocab_size=30, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=24)


def _gpt2() -> tf.GPT2Config:
    return tf.GPT2Config(vocab_size=30, n_embd=24, n_layer=2, n_head=3, n_positions=24, pad_token_id=0)


def _resnet(kind: str) -> nn.Module:
    return tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[2, 2], layer_type=kind, num_labels=5)
    )


def _multi(backbone: nn.Module, **settings: Any) -> nn.Module:
    return MultiTaskModel.from_backbone(backbone, tasks=_TASKS, seed=0, **settings)


def _zero_shot() -> nn.Module:
    config = tf.CLIPVisionConfig(**_IMAGE, projection_dim=8)
    tasks = {"b": {"labels": ["cat", "dog"], "head": "zero_shot"}}
    return MultiTaskModel(
        MultiTaskConfig(backbone_config=config, tasks=tasks, backbone_class="CLIPVisionModelWithProjection")
    )


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_ENCODER)),
    "bert masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**_ENCODER)),
    "bert masked, free decoder": lambda: tf.BertForMaskedLM(tf.BertConfig(**_ENCODER, tie_word_embeddings=False)),
    "bert tokens": lambda: tf.BertForTokenClassification(tf.BertConfig(**_ENCODER)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_ENCODER)),
    "roberta masked": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_ENCODER)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(_distilbert()),
    "distilbert masked": lambda: tf.DistilBertForMaskedLM(_distilbert()),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**_IMAGE)),
    "clip": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**_IMAGE, projection_dim=8)),
    "gpt2": lambda: tf.GPT2LMHeadModel(_gpt2()),
    "gpt2 tokens": lambda: tf.GPT2ForTokenClassification(_gpt2()),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_DECODER)),
    "qwen2": lambda: tf.Qwen2ForTokenClassification(tf.Qwen2Config(**_DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER)),
    "resnet": lambda: _resnet("basic"),
    "resnet, bottleneck": lambda: _resnet("bottleneck"),
    "tasks, bert": lambda: _multi(tf.BertModel(tf.BertConfig(**_ENCODER))),
    "tasks, roberta, mean": lambda: _multi(tf.RobertaModel(tf.RobertaConfig(**_ENCODER)), pooling="mean"),
    "tasks, vit, pooler": lambda: _multi(tf.ViTModel(tf.ViTConfig(**_IMAGE)), pooling="pooler"),
    "tasks, clip": _zero_shot,
    "tasks, resnet": lambda: _multi(_resnet("basic").resnet),
}
_PICTURES = {"vit": 16, "deit": 16, "clip": 16, "resnet": 32}


def _inputs(name: str) -> dict[str, Any]:
    family = name.removeprefix("tasks, ")
    size = _PICTURES.get(family.partition(",")[0])
    values = {"pixel_values": images(size)} if size else tokens()
    return values if family == name else {**values, "task": "b"}


def _case(name: str) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    return lambda: (_BUILDERS[name](), _inputs(name))


TRANSFORMERS = {name: _case(name) for name in _BUILDERS}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with every parameter and statistic at random, so that nothing hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise + value)
    return model.eval()


def planted(model: nn.Module, spec: Any, count: int, noise: float, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Random orders, and copies of one network in them, each entry disturbed by a share of its tensor's deviation."""
    generator = torch.Generator().manual_seed(seed)
    orders = [Permutation.random(spec, seed + index) for index in range(count)]
    states = []
    for order in orders:
        state = order.apply(dict(model.state_dict()))
        # In place, so that ties stay.
        for value in state.values():
            if value.is_floating_point() and value.numel() > 1:
                scale = noise * value.std()
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * scale)
        states.append(state)
    return orders, states
