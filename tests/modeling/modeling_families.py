"""Tiny random models of many families, the stock class of each, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
_LLAMA = {**_SMALL, "num_key_value_heads": 1, "pad_token_id": 0}


@dataclass(frozen=True)
class Family:
    """`config()` gives the backbone's configuration; `stock` names the class plain transformers would use."""

    stock: str
    config: Callable[[], Any]
    kind: str = "encoder"  # encoder, decoder, image

    @property
    def stock_class(self) -> Any:
        return getattr(tf, self.stock)


FAMILIES = {
    "bert": Family("BertForSequenceClassification", lambda: tf.BertConfig(**_SMALL)),
    "roberta": Family("RobertaForSequenceClassification", lambda: tf.RobertaConfig(**_SMALL)),
    "xlm-roberta": Family("XLMRobertaForSequenceClassification", lambda: tf.XLMRobertaConfig(**_SMALL)),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        lambda: tf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
    ),
    "electra": Family("ElectraForSequenceClassification", lambda: tf.ElectraConfig(**_SMALL, embedding_size=12)),
    "albert": Family("AlbertForSequenceClassification", lambda: tf.AlbertConfig(**_SMALL, embedding_size=12)),
    "mpnet": Family("MPNetForSequenceClassification", lambda: tf.MPNetConfig(**_SMALL)),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification",
        lambda: tf.DebertaV2Config(
            **_SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=16
        ),
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        lambda: tf.ModernBertConfig(**_SMALL, pad_token_id=0, classifier_pooling="mean"),
    ),
    "bart": Family(
        "BartForSequenceClassification",
        lambda: tf.BartConfig(
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=2,
        ),
    ),
    "llama": Family("LlamaForSequenceClassification", lambda: tf.LlamaConfig(**_LLAMA), "decoder"),
    "qwen2": Family("Qwen2ForSequenceClassification", lambda: tf.Qwen2Config(**_LLAMA), "decoder"),
    "mixtral": Family(
        "MixtralForSequenceClassification", lambda: tf.MixtralConfig(**_LLAMA, num_local_experts=2), "decoder"
    ),
    "gpt2": Family(
        "GPT2ForSequenceClassification",
        lambda: tf.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0),
        "decoder",
    ),
    "opt": Family(
        "OPTForSequenceClassification",
        lambda: tf.OPTConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            pad_token_id=0,
        ),
        "decoder",
    ),
    "bloom": Family(
        "BloomForSequenceClassification",
        lambda: tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0),
        "decoder",
    ),
    "vit": Family("ViTForImageClassification", lambda: tf.ViTConfig(**_VIT), "image"),
    "deit": Family("DeiTForImageClassification", lambda: tf.DeiTConfig(**_VIT), "image"),
    "dinov2": Family("Dinov2ForImageClassification", lambda: tf.Dinov2Config(**_VIT), "image"),
    "beit": Family("BeitForImageClassification", lambda: tf.BeitConfig(**_VIT), "image"),
    "swin": Family(
        "SwinForImageClassification",
        lambda: tf.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2),
        "image",
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        lambda: tf.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2),
        "image",
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        lambda: tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        "image",
    ),
    "regnet": Family(
        "RegNetForImageClassification",
        lambda: tf.RegNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], groups_width=4),
        "image",
    ),
    "imagegpt": Family(
        "ImageGPTForImageClassification",
        lambda: tf.ImageGPTConfig(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0),
    ),
    "clip_vision_model": Family(
        "CLIPForImageClassification", lambda: tf.CLIPVisionConfig(**_VIT, projection_dim=8), "image"
    ),
    "siglip_vision_model": Family("SiglipForImageClassification", lambda: tf.SiglipVisionConfig(**_VIT), "image"),
}


def make_backbone(name: str, seed: int = 0) -> Any:
    """A random backbone whose every weight and buffer differs from its initial constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shake(tf.AutoModel.from_config(FAMILIES[name].config())).eval()


@torch.no_grad()
def shake(model: torch.nn.Module) -> Any:
    """Adds noise to all parameters, so that zero biases and unit norms cannot hide a missing copy."""
    for parameter in model.parameters():
        # Convolutions need more, or the signal dies in the narrow layers.
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 4 else 0.05))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer) * 0.1)
    return model


def make_inputs(name: str, left: bool = False, mask: bool = True) -> dict[str, torch.Tensor]:
    """Four examples; texts have lengths 7, 5, 4 and 2 and end in token 2, padded with each model's padding token."""
    generator = torch.Generator().manual_seed(1)
    family = FAMILIES[name]
    if family.kind == "image":
        size = 32 if name in ("resnet", "convnext", "regnet") else 8
        return {"pixel_values": torch.randn(4, 3, size, size, generator=generator)}
    pad = family.config().pad_token_id
    ids, attention = torch.full((4, 7), pad), torch.zeros(4, 7, dtype=torch.long)
    for row, length in enumerate((7, 5, 4, 2)):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        tokens[-1] = 2
        where = slice(7 - length, 7) if left else slice(0, length)
        ids[row, where], attention[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": attention} if mask else {"input_ids": ids}
