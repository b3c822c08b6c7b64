"""Networks by name: `mlp-512-256`, `resnet20-ln-x4`, `resnet20-bn-x2`, `vit-128-3`."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.functional import layer_norm


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


NORMS = {"bn": nn.BatchNorm2d, "ln": ChannelNorm}


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution of its own where the stream changes."""

    def __init__(self, inner: int, outer: int, norm: type[nn.Module]) -> None:
        super().__init__()
        stride = 1 if inner == outer else 2
        self.branch = nn.Sequential(
            *_unit(inner, outer, 3, stride, norm), nn.ReLU(inplace=True), *_unit(outer, outer, 3, 1, norm)
        )
        self.shortcut = nn.Identity() if inner == outer else nn.Sequential(*_unit(inner, outer, 1, stride, norm))

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


def _unit(inner: int, outer: int, size: int, stride: int, norm: type[nn.Module]) -> list[nn.Module]:
    return [nn.Conv2d(inner, outer, size, stride, size // 2, bias=False), norm(outer)]


def resnet(depth: int, norm: type[nn.Module], width: int, channels: int, classes: int) -> nn.Sequential:
    """Three stages as on CIFAR; depth 20 has three blocks in each. Width 1 starts with 16 channels."""
    sizes = [16 * width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
    stem = nn.Sequential(*_unit(channels, sizes[0], 3, 1, norm), nn.ReLU(inplace=True))
    blocks = [Residual(inner, outer, norm) for inner, outer in zip([sizes[0], *sizes], sizes, strict=False)]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = {"stem": stem, "blocks": nn.Sequential(*blocks), "pool": pool, "head": nn.Linear(sizes[-1], classes)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


class ViT(nn.Module):
    """A ViT of transformers that gives logits for images, as the other networks do."""

    def __init__(self, hidden: int, layers: int, shape: tuple[int, int, int], classes: int) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        config = ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            image_size=shape[1],
            patch_size=4,
            num_channels=shape[0],
            num_labels=classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.model = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """
    A network with random weights.

    Args:
        name (`str`): `mlp` and the sizes of its hidden layers; `resnet`, its depth, norm (`bn` or `ln`) and width; `vit`,
            its hidden size and number of layers.
        shape (`tuple[int, int, int]`): channels, height and width of its images.
        classes (`int`): how many.
    """
    if found := re.fullmatch(r"mlp((?:-\d+)+)", name):
        sizes = [shape[0] * shape[1] * shape[2], *map(int, found[1][1:].split("-"))]
        hidden = [
            part
            for inner, outer in zip(sizes, sizes[1:], strict=False)
            for part in (nn.Linear(inner, outer), nn.ReLU())
        ]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))
    if found := re.fullmatch(r"resnet(\d+)-(bn|ln)-x(\d+)", name):
        return resnet(int(found[1]), NORMS[found[2]], int(found[3]), shape[0], classes)
    if found := re.fullmatch(r"vit-(\d+)-(\d+)", name):
        return ViT(int(found[1]), int(found[2]), shape, classes)
    raise ValueError(f"No network is called {name!r}; names look like mlp-512-256, resnet20-ln-x4 or vit-128-3.")
