"""Heads: what turns a backbone's outputs into one task's logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


# Columns that a tokenizer of another family may produce; a model without such a parameter does without them, as the
# Trainer's own column removal would have it.
_OPTIONAL_INPUTS = ("token_type_ids", "position_ids")


def fitting_inputs(inputs: dict[str, Any], accepted: frozenset[str]) -> dict[str, Any]:
    """The inputs that a backbone takes, of those that tokenizers add unasked."""
    inputs = {name: value for name, value in inputs.items() if name in accepted or name not in _OPTIONAL_INPUTS}
    if "use_cache" in accepted:
        inputs.setdefault("use_cache", False)  # one forward pass per example: a key-value cache is waste
    return inputs


def last_token_index(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, pad_token_id: int | None, batch_size: int
) -> torch.Tensor | int:
    """Index of each sequence's last token that is not padding, on either side.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Decides without a mask.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Decides if given. It is
            the safer of the two: many decoders pad with their end-of-sequence token.
        pad_token_id (`int`, *optional*): The padding token.
        batch_size (`int`): Number of sequences.

    Returns:
        `torch.Tensor` of shape `(batch_size,)` or -1 where only the end of the sequence can be meant.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        present = attention_mask != 0
    elif input_ids is not None and pad_token_id is not None:
        present = input_ids != pad_token_id
    elif input_ids is not None and batch_size > 1:
        raise ValueError(
            "a batch without attention_mask needs the backbone's config.pad_token_id to find each last token; pass "
            "the mask or set it"
        )
    else:
        return -1
    return (torch.arange(present.shape[1], device=present.device) * present.int()).argmax(-1)


def mask_positions(inputs: dict[str, Any], accepted: frozenset[str]) -> dict[str, Any]:
    """Adds `position_ids` counted over real tokens, so that left padding moves no absolute position embedding."""
    mask = inputs.get("attention_mask")
    if "position_ids" in accepted and inputs.get("position_ids") is None and mask is not None and mask.dim() == 2:
        inputs["position_ids"] = ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def _last_hidden(hidden: torch.Tensor, inputs: dict[str, Any], config: PreTrainedConfig) -> torch.Tensor:
    pad_token_id = getattr(config.get_text_config(), "pad_token_id", None)
    index = last_token_index(inputs.get("input_ids"), inputs.get("attention_mask"), pad_token_id, len(hidden))
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


class StockHead(nn.Module):
    """A task's head with the parameters and the code of the backbone family's stock classification class.

    It holds every module of the stock class but the backbone, and runs that class's own `forward` over the shared
    backbone and these modules. The backbone is passed in, not kept: copies of a head (PEFT's `modules_to_save`) then
    see the shared backbone too.

    A class whose only head is a linear `score` takes the last token; that is done here, so that the attention mask
    decides which token is last and left padding does not shift absolute positions.

    Args:
        stock ([`PreTrainedModel`]): The stock model on the meta device; its modules move into this head.
        name (`str`): The stock model's child that stands for the backbone.
        path (`str`): Where that child's counterpart is inside the shared backbone; empty for the backbone itself.
    """

    score: Any

    def __init__(self, stock: PreTrainedModel, name: str, path: str) -> None:
        super().__init__()
        self.stock_class, self.backbone_name, self.backbone_path = type(stock), name, path
        kind = type(getattr(stock, name))
        for child_name, child in stock.named_children():
            if child_name != name:
                self.add_module(child_name, child)
        self._parameters.update(stock._parameters)
        self._buffers.update(stock._buffers)
        # ImageGPT has a lone `score` too, but averages.
        decoder = set(self._modules) == {"score"} and isinstance(self.score, nn.Linear)
        self.last_token = decoder and self.stock_class.__name__.endswith("ForSequenceClassification")
        runs = kind if self.last_token else self.stock_class
        self.accepted = frozenset(inspect.signature(runs.forward).parameters)
        tensors = ("_modules", "_parameters", "_buffers")
        self.stock_state = {key: value for key, value in vars(stock).items() if key not in tensors}

    def shell(self, backbone: nn.Module) -> PreTrainedModel:
        """An instance of the stock class over the given backbone and this head's modules; nothing is copied."""
        shell = object.__new__(self.stock_class)
        shell.__dict__.update(self.stock_state)
        shell.__dict__.update(
            _modules={self.backbone_name: backbone, **self._modules},
            _parameters=self._parameters,
            _buffers=self._buffers,
            training=self.training,
        )
        return shell

    def forward(self, backbone: PreTrainedModel, **inputs: Any) -> Any:
        inputs = fitting_inputs(inputs, self.accepted)
        if self.backbone_path:
            backbone = backbone.get_submodule(self.backbone_path)
        if not self.last_token:
            return self.stock_class.forward(self.shell(backbone), **inputs)
        inputs = mask_positions(inputs, self.accepted)
        outputs = backbone(**inputs)
        pooled = _last_hidden(outputs.last_hidden_state, inputs, backbone.config)
        return SequenceClassifierOutput(
            logits=self.score(pooled), hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )


def feature_width(config: PreTrainedConfig) -> int | None:
    """Width of a backbone's features, if its configuration tells."""
    text = config.get_text_config()
    sizes = getattr(text, "hidden_sizes", None)
    return getattr(text, "hidden_size", None) or (sizes[-1] if sizes else None)


def known_width(config: PreTrainedConfig, feature_size: int | None = None) -> int:
    """`feature_size`, or what the configuration tells.

    Raises:
        ValueError: If neither is known.
    """
    width = feature_size or feature_width(config)
    if width is None:
        raise ValueError(f"{type(config).__name__} does not tell the width of its features; set feature_size")
    return width


class PooledHead(nn.Module):
    """Dropout and a linear classifier over an explicitly chosen pooling, for families without a stock class.

    Args:
        config ([`PreTrainedConfig`]): The backbone's configuration.
        pooling (`str`): `"cls"` (first token), `"mean"` (over real tokens), `"last_token"`, `"pooler"` (the
            backbone's `pooler_output`) or `"image_pool"` (mean over the feature map or all tokens).
        num_labels (`int`): Number of outputs.
        feature_size (`int`, *optional*): Width of the pooled vector, if the configuration does not tell it.
    """

    def __init__(
        self, config: PreTrainedConfig, pooling: str, num_labels: int, feature_size: int | None = None
    ) -> None:
        super().__init__()
        width = known_width(config, feature_size)
        text = config.get_text_config()
        dropout = getattr(text, "classifier_dropout", None)
        if dropout is None:
            dropout = getattr(text, "hidden_dropout_prob", None) or 0.0
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, backbone: PreTrainedModel, **inputs: Any) -> Any:
        pooled, outputs = pooled_features(self.pooling, backbone, inputs)
        logits = self.classifier(self.dropout(pooled))
        return SequenceClassifierOutput(
            logits=logits, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )


def pooled_features(pooling: str, backbone: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Runs a backbone; its pooled features, as [`pool_hidden`] makes them, and its outputs."""
    accepted = frozenset(inspect.signature(type(backbone).forward).parameters)
    inputs = fitting_inputs(inputs, accepted)
    if pooling == "last_token":
        inputs = mask_positions(inputs, accepted)
    outputs = backbone(**inputs)
    return pool_hidden(pooling, outputs, inputs, backbone), outputs


def pool_hidden(pooling: str, outputs: Any, inputs: dict[str, Any], backbone: PreTrainedModel) -> torch.Tensor:
    """The pooled features of a backbone's outputs, of shape `(batch_size, feature_size)`.

    Args:
        pooling (`str`): As in [`PooledHead`].
        outputs ([`ModelOutput`]): What the backbone returned.
        inputs (`dict`): What it was given; the mask is read.
        backbone ([`PreTrainedModel`]): The backbone.
    """
    if pooling == "pooler":
        if outputs.get("pooler_output") is None:
            raise ValueError(f"{type(backbone).__name__} gives no pooler_output; choose another pooling")
        return outputs.pooler_output.flatten(1)
    hidden = outputs.last_hidden_state
    if pooling == "image_pool":
        return hidden.flatten(2).mean(-1) if hidden.dim() == 4 else hidden.mean(1)
    if hidden.dim() != 3:
        raise ValueError(
            f"pooling {pooling!r} needs one vector per token, but {type(backbone).__name__} gives features "
            f"of shape {tuple(hidden.shape)}; choose pooler or image_pool"
        )
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last_token":
        return _last_hidden(hidden, inputs, backbone.config)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class ZeroShotHead(nn.Module):
    """A frozen head of text features: `logits = exp(logit_scale) * <image, text>` of normalised features.

    Args:
        num_labels (`int`): Number of classes.
        dimension (`int`): Width of the space that images and texts are projected to.
    """

    def __init__(self, num_labels: int, dimension: int) -> None:
        super().__init__()
        self.text_features = nn.Parameter(torch.empty(num_labels, dimension), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.empty(()), requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random unit vectors and CLIP's initial scale, for a model built from its configuration alone."""
        features = torch.randn(self.text_features.shape)
        self.text_features.copy_(features / features.norm(dim=-1, keepdim=True))
        self.logit_scale.fill_(2.6592)

    def forward(self, backbone: PreTrainedModel, **inputs: Any) -> SequenceClassifierOutput:
        outputs = backbone(**inputs)
        image = outputs.image_embeds
        image = image / image.norm(dim=-1, keepdim=True)
        logits = image @ self.text_features.to(image.dtype).T * self.logit_scale.to(image.dtype).exp()
        return SequenceClassifierOutput(
            logits=logits, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )
