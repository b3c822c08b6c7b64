"""Llama, Mistral and Qwen: rotary positions, gated FFN, grouped key-value heads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..spec import Flat, Group, Heads, PermutationSpec
from .bert import TASK_HEADS
from .parts import Axes, attention, linear


def llama_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Rotary positions give every unit of queries and keys a frequency, so these keep their places inside a head, and so
    do the entries of norms over queries and keys, which all heads share."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups: dict[str, Group] = {"R": Flat(config.hidden_size)}
    axes: Axes = {"embed_tokens.weight": (None, "R"), "norm.weight": ("R",)}
    for layer in range(config.num_hidden_layers):
        groups[f"A.{layer}"] = Heads(kv, heads // kv, dim, qk_inner=False)
        groups[f"M.{layer}"] = Flat(config.intermediate_size)
        at = f"layers.{layer}"
        axes |= {
            **attention([f"{at}.self_attn.{part}_proj" for part in "qkvo"], f"A.{layer}", "R"),
            **linear(f"{at}.mlp.gate_proj", f"M.{layer}", "R"),
            **linear(f"{at}.mlp.up_proj", f"M.{layer}", "R"),
            **linear(f"{at}.mlp.down_proj", "R", f"M.{layer}"),
            f"{at}.input_layernorm.weight": ("R",),
            f"{at}.post_attention_layernorm.weight": ("R",),
            f"{at}.self_attn.q_norm.weight": (None,),
            f"{at}.self_attn.k_norm.weight": (None,),
        }
    for name in ("lm_head", "score", "classifier", "qa_outputs"):
        axes |= linear(name, None, "R")
    needed = [name for name in axes if name.startswith(("embed", "layers")) and name.endswith("weight")]
    optional = [name for name in axes if name not in needed or "_norm." in name]
    return PermutationSpec(groups, axes, TASK_HEADS, optional)
