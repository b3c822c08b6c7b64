"""BERT, RoBERTa and DistilBERT: encoders with the norm after each branch, one stream through the whole network."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..spec import Flat, Group, Heads, PermutationSpec
from .parts import Axes, attention, linear, norm


# Outputs that mean something else in every task.
TASK_HEADS = ("classifier.*", "score.*", "qa_outputs.*", "seq_relationship.*", "pre_classifier.*")


def bert_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Of BERT and RoBERTa, with any of their heads. A masked-language-model head whose decoder is tied to the embeddings
    works in the stream's order, else in one of its own."""
    width = config.hidden_size
    heads = config.num_attention_heads
    groups: dict[str, Group] = {"R": Flat(width), "Pool": Flat(width)}
    axes: Axes = {
        "embeddings.word_embeddings.weight": (None, "R"),
        "embeddings.position_embeddings.weight": (None, "R"),
        "embeddings.token_type_embeddings.weight": (None, "R"),
        **norm("embeddings.LayerNorm", "R"),
    }
    for layer in range(config.num_hidden_layers):
        groups[f"A.{layer}"] = Heads(heads, 1, width // heads)
        groups[f"M.{layer}"] = Flat(config.intermediate_size)
        at = f"encoder.layer.{layer}"
        projections = [f"{at}.attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
        axes |= {
            **attention(projections, f"A.{layer}", "R"),
            **norm(f"{at}.attention.output.LayerNorm", "R"),
            **linear(f"{at}.intermediate.dense", f"M.{layer}", "R"),
            **linear(f"{at}.output.dense", "R", f"M.{layer}"),
            **norm(f"{at}.output.LayerNorm", "R"),
        }
    body = list(axes)
    # A classifier of tokens reads the stream, one of sequences the pooler.
    roberta = config.model_type != "bert"
    pooled = not roberta and (not names or any(name.endswith("pooler.dense.weight") for name in names))
    axes |= {
        **linear("pooler.dense", "Pool", "R"),
        **linear("classifier", None, "Pool" if pooled else "R"),
        **linear("classifier.dense", "Pool", "R"),
        **linear("classifier.out_proj", None, "Pool"),
        **linear("qa_outputs", None, "R"),
        **linear("seq_relationship", None, "Pool"),
        "predictions.bias": (None,),
        "lm_head.bias": (None,),
    }
    own = "R"
    if not config.tie_word_embeddings:
        own, groups["T"] = "T", Flat(width)
    for transform, norms, decoder in (
        ("predictions.transform.dense", "predictions.transform.LayerNorm", "predictions.decoder"),
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    ):
        axes |= {**linear(transform, own, "R"), **norm(norms, own), **linear(decoder, None, own)}
    return PermutationSpec(groups, axes, TASK_HEADS, [name for name in axes if name not in body])


def distilbert_spec(config: Any, names: Collection[str]) -> PermutationSpec:
    """Of DistilBERT, with any of its heads."""
    width = config.dim
    groups: dict[str, Group] = {"R": Flat(width), "Pool": Flat(width)}
    axes: Axes = {
        "embeddings.word_embeddings.weight": (None, "R"),
        "embeddings.position_embeddings.weight": (None, "R"),
        **norm("embeddings.LayerNorm", "R"),
    }
    for layer in range(config.n_layers):
        groups[f"A.{layer}"] = Heads(config.n_heads, 1, width // config.n_heads)
        groups[f"M.{layer}"] = Flat(config.hidden_dim)
        at = f"transformer.layer.{layer}"
        projections = [f"{at}.attention.{part}_lin" for part in ("q", "k", "v", "out")]
        axes |= {
            **attention(projections, f"A.{layer}", "R"),
            **norm(f"{at}.sa_layer_norm", "R"),
            **linear(f"{at}.ffn.lin1", f"M.{layer}", "R"),
            **linear(f"{at}.ffn.lin2", "R", f"M.{layer}"),
            **norm(f"{at}.output_layer_norm", "R"),
        }
    body = list(axes)
    pooled = not names or any(name.endswith("pre_classifier.weight") for name in names)
    own = "R"
    if not config.tie_word_embeddings:
        own, groups["T"] = "T", Flat(width)
    axes |= {
        **linear("pre_classifier", "Pool", "R"),
        **linear("classifier", None, "Pool" if pooled else "R"),
        **linear("qa_outputs", None, "R"),
        **linear("vocab_transform", own, "R"),
        **norm("vocab_layer_norm", own),
        **linear("vocab_projector", None, own),
    }
    return PermutationSpec(groups, axes, TASK_HEADS, [name for name in axes if name not in body])
