"""SqueezeNet 1.0 (https://huggingface.co/papers/1602.07360) as a transformers backbone, from torchvision's weights.

    python benchmarks/quality/squeezenet.py --weights ../shared/data/checkpoints/squeezenet1_0_imagenet_torchvision.pt

The smallest network with ImageNet weights at hand: 735 thousand parameters, no batch normalisation.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_atm.tasks import make_image_processor


# Squeeze channels and expand channels (1x1, and as many 3x3) of the fire modules; None is a pooling layer.
_LAYERS = [None, (16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256), None, (64, 256)]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class SqueezeNetConfig(PreTrainedConfig):
    """Nothing can be chosen; `hidden_size` is what a head needs to know."""

    model_type = "atm_benchmark_squeezenet"

    def __init__(self, hidden_size: int = 512, hidden_dropout_prob: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.hidden_dropout_prob = hidden_dropout_prob


class Fire(nn.Module):
    """Few channels, then many: a 1x1 convolution followed by 1x1 and 3x3 ones side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], dim=1)


class SqueezeNetModel(PreTrainedModel):
    """The convolutional part of SqueezeNet 1.0, module names as in torchvision."""

    config_class = SqueezeNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = "squeezenet"

    def __init__(self, config: SqueezeNetConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [nn.Conv2d(3, 96, 7, stride=2), nn.ReLU()]
        channels = 96
        for layer in _LAYERS:
            if layer is None:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            else:
                layers.append(Fire(channels, *layer))
                channels = 2 * layer[1]
        self.features = nn.Sequential(*layers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """`(batch_size, 3, height, width)` to `last_hidden_state` of shape `(batch_size, 512, h, w)`.

        Features are normalised over channels, without parameters: as they are they reach a thousand, and a new linear
        head would start from a loss of hundreds.
        """
        features = self.features(pixel_values).permute(0, 2, 3, 1)
        features = nn.functional.layer_norm(features, features.shape[-1:])
        return BaseModelOutput(last_hidden_state=features.permute(0, 3, 1, 2))


AutoConfig.register(SqueezeNetConfig.model_type, SqueezeNetConfig, exist_ok=True)
AutoModel.register(SqueezeNetConfig, SqueezeNetModel, exist_ok=True)


def convert(weights: str, output_dir: str, size: int = 48) -> None:
    """Writes a folder that `AutoModel` loads, with an image processor for small square images."""
    stored = torch.load(weights, weights_only=True)
    model = SqueezeNetModel(SqueezeNetConfig())
    model.load_state_dict({name: tensor for name, tensor in stored.items() if name.startswith("features.")})
    model.save_pretrained(output_dir)
    make_image_processor(size, 3, _IMAGENET_MEAN, _IMAGENET_STD).save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="torchvision's file")
    parser.add_argument("--output_dir", default="runs/squeezenet", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=48, help="side that images are brought to (default: %(default)s)")
    options = parser.parse_args()
    convert(options.weights, options.output_dir, options.size)
