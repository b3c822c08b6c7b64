"""GPT-2: weights stored as (inputs, outputs), queries, keys and values in one tensor."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..spec import Flat, Group, Heads, PermutationSpec
from .bert import TASK_HEADS
from .parts import Axes, linear, norm, transposed


def gpt2_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Of GPT-2, with a language-model head or a classifier."""
    width, heads = config.n_embd, config.n_head
    groups: dict[str, Group] = {"R": Flat(width)}
    axes: Axes = {"wte.weight": (None, "R"), "wpe.weight": (None, "R"), **norm("ln_f", "R")}
    stored: Axes = {}
    for layer in range(config.n_layer):
        group, at = f"A.{layer}", f"h.{layer}"
        groups[group] = Heads(heads, 1, width // heads)
        groups[f"M.{layer}"] = Flat(config.n_inner or 4 * width)
        stored |= {
            **transposed(f"{at}.attn.c_attn", [f"{group}:q", f"{group}:k", f"{group}:v"], "R"),
            **transposed(f"{at}.attn.c_proj", "R", f"{group}:o"),
            **transposed(f"{at}.mlp.c_fc", f"M.{layer}", "R"),
            **transposed(f"{at}.mlp.c_proj", "R", f"M.{layer}"),
        }
        axes |= {**norm(f"{at}.ln_1", "R"), **norm(f"{at}.ln_2", "R")}
    outputs = {"lm_head.weight": (None, "R"), **linear("score", None, "R"), **linear("classifier", None, "R")}
    weights = [name for name in stored if name.endswith("weight")]
    return PermutationSpec(groups, axes | stored | outputs, TASK_HEADS, list(outputs), weights)
