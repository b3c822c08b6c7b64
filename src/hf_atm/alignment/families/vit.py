"""ViT, DeiT and the image tower of CLIP: encoders with the norm before each branch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..spec import Flat, Group, Heads, PermutationSpec
from .bert import TASK_HEADS
from .parts import Axes, attention, conv, linear, norm


# Names of a layer's parts in memory and in older files: layer, q, k, v, out, FFN in, FFN out.
_NAMES = (
    ("layers", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    (
        "encoder.layer",
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
)


def vit_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Of ViT and DeiT, under the names of modules and of saved files."""
    width, heads = config.hidden_size, config.num_attention_heads
    groups: dict[str, Group] = {"R": Flat(width), "Pool": Flat(getattr(config, "pooler_output_size", None) or width)}
    axes: Axes = {
        "embeddings.position_embeddings": (None, None, "R"),
        **conv("embeddings.patch_embeddings.projection", "R", None),
        **norm("layernorm", "R"),
    }
    needed = {"embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"}
    for layer in range(config.num_hidden_layers):
        groups[f"A.{layer}"] = Heads(heads, 1, width // heads)
        groups[f"M.{layer}"] = Flat(config.intermediate_size)
        for stem, *projections, first, second in _NAMES:
            at = f"{stem}.{layer}"
            axes |= {
                **attention([f"{at}.{name}" for name in projections], f"A.{layer}", "R"),
                **norm(f"{at}.layernorm_before", "R"),
                **norm(f"{at}.layernorm_after", "R"),
                **linear(f"{at}.{first}", f"M.{layer}", "R"),
                **linear(f"{at}.{second}", "R", f"M.{layer}"),
            }
    axes |= {
        "embeddings.cls_token": (None, None, "R"),
        "embeddings.distillation_token": (None, None, "R"),
        "embeddings.mask_token": (None, None, "R"),
        **linear("pooler.dense", "Pool", "R"),
        **linear("classifier", None, "R"),
        **linear("cls_classifier", None, "R"),
        **linear("distillation_classifier", None, "R"),
    }
    extra = ("cls_classifier.*", "distillation_classifier.*")
    return PermutationSpec(groups, axes, (*TASK_HEADS, *extra), [name for name in axes if name not in needed])


def clip_vision_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Of CLIP's image tower; the output of its projection is the space of texts and stays."""
    width, heads = config.hidden_size, config.num_attention_heads
    groups: dict[str, Group] = {"R": Flat(width)}
    axes: Axes = {
        "embeddings.class_embedding": ("R",),
        "embeddings.patch_embedding.weight": ("R", None, None, None),
        "embeddings.position_embedding.weight": (None, "R"),
    }
    for layer in range(config.num_hidden_layers):
        groups[f"A.{layer}"] = Heads(heads, 1, width // heads)
        groups[f"M.{layer}"] = Flat(config.intermediate_size)
        at = f"layers.{layer}"
        projections = [f"{at}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
        axes |= {
            **attention(projections, f"A.{layer}", "R"),
            **linear(f"{at}.mlp.fc1", f"M.{layer}", "R"),
            **linear(f"{at}.mlp.fc2", "R", f"M.{layer}"),
            **norm(f"{at}.layer_norm1", "R"),
            **norm(f"{at}.layer_norm2", "R"),
        }
    body = list(axes)
    axes |= {
        **norm("pre_layrnorm", "R"),
        **norm("post_layernorm", "R"),
        **linear("visual_projection", None, "R"),
        **linear("classifier", None, "R"),
    }
    return PermutationSpec(groups, axes, TASK_HEADS, [name for name in axes if name not in body])
