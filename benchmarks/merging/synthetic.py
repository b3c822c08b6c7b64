"""Synthetic checkpoints and adapters: real Hugging Face folders with random weights, for benchmarks.

    python benchmarks/merging/synthetic.py llama FOLDER     # base + 4 models, 271 million parameters each, bfloat16
    python benchmarks/merging/synthetic.py bert FOLDER      # base + 8 models, 109 million parameters each, float32
    python benchmarks/merging/synthetic.py small FOLDER     # base + 4 models of 3,999 tensors of at most 64 x 64
    python benchmarks/merging/synthetic.py adapters FOLDER  # 8 LoRA adapters of rank 16 for layers of 4096 x 4096

Weights are N(0, .02), task vectors N(0, .002), rounded to the stored type once; so deltas of bfloat16 models sit on a
coarse grid and tie in magnitude, as those of real models do. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


WEIGHT_STD, DELTA_STD = 0.02, 0.002
RECORD = "synthetic.json"


@dataclass(frozen=True)
class Checkpoints:
    """A base model and fine-tuned models of one shape."""

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    dtype: str
    tasks: int
    seed: int = 0

    def scaled(self, scale: float) -> Checkpoints:
        """Fewer layers and a smaller vocabulary; matrices keep their shape."""
        layers, vocabulary = (max(1, round(scale * count)) for count in (self.layers, self.vocabulary))
        return replace(self, layers=layers, vocabulary=max(64, vocabulary))

    def tiny(self) -> Checkpoints:
        """The same architecture as small as it gets, for trying things out."""
        return replace(self, hidden=64, intermediate=64, layers=1, vocabulary=64, heads=4)


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters of one shape, for square layers."""

    hidden: int = 4096
    rank: int = 16
    alpha: int = 32
    modules: int = 2
    tasks: int = 8
    seed: int = 0

    def tiny(self) -> Adapters:
        """The same adapters for layers of a few inputs and outputs."""
        return replace(self, hidden=256)


# The embedding table and the head of `llama` and `small` are two tensors (untied). `bert` has a classifier, because
# mergekit 0.1.5 ends with a TypeError on the architecture BertModel.
CHECKPOINTS = {
    "llama": Checkpoints("LlamaForCausalLM", 1024, 2816, 16, 32000, 16, "bfloat16", 4),
    "bert": Checkpoints("BertForSequenceClassification", 768, 3072, 12, 30522, 12, "float32", 8),
    "small": Checkpoints("LlamaForCausalLM", 64, 64, 444, 64, 4, "bfloat16", 4),
}


def build(what: Checkpoints | Adapters, folder: Path) -> Path:
    """Write `what` to `folder`, or leave it as it is when it holds just that.

    Args:
        what (`Checkpoints` or `Adapters`): shapes, types, number of tasks and seed.
        folder (`Path`): gets one subfolder per model: `base` (checkpoints only) and `task0`, `task1`, ...

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: if the folder holds something else.
    """
    record = folder / RECORD
    request = description(what)
    if record.exists() and record.read_text(encoding="utf-8") == request:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; name an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(what, Adapters):
        build_adapters(what, folder)
    else:
        build_checkpoints(what, folder)
    record.write_text(request, encoding="utf-8")
    return folder


def description(what: Checkpoints | Adapters) -> str:
    return json.dumps({type(what).__name__: asdict(what)}, indent=2)


def digest(what: Checkpoints | Adapters) -> str:
    """A name for a folder that holds just this."""
    return hashlib.sha256(description(what).encode()).hexdigest()[:12]


def build_checkpoints(what: Checkpoints, folder: Path) -> None:
    dtype = getattr(torch, what.dtype)
    base = {}
    for index, (name, shape) in enumerate(shapes_of(what).items()):
        center = 1.0 if name.endswith("norm.weight") else 0.0
        base[name] = normal(shape, WEIGHT_STD, what.seed, 0, index).add_(center).to(dtype)
    write_checkpoint(what, base, folder / "base")
    for task in range(what.tasks):
        tuned = {
            name: normal(tensor.shape, DELTA_STD, what.seed, task + 1, index).add_(tensor.float()).to(dtype)
            for index, (name, tensor) in enumerate(base.items())
        }
        write_checkpoint(what, tuned, folder / f"task{task}")


def normal(shape: tuple[int, ...], std: float, *key: int) -> Tensor:
    seed = 0
    for part in key:
        seed = seed * 1_000_003 + part
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


def shapes_of(what: Checkpoints) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    return dict(llama_shapes(what) if what.architecture.startswith("Llama") else bert_shapes(what))


def llama_shapes(what: Checkpoints) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = what.hidden, what.intermediate
    yield "model.embed_tokens.weight", (what.vocabulary, hidden)
    for layer in range(what.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for part in "qkvo":
            yield f"{prefix}.self_attn.{part}_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for part, shape in {"gate": (intermediate, hidden), "up": (intermediate, hidden)}.items():
            yield f"{prefix}.mlp.{part}_proj.weight", shape
        yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (what.vocabulary, hidden)


def bert_shapes(what: Checkpoints) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = what.hidden, what.intermediate
    yield "bert.embeddings.word_embeddings.weight", (what.vocabulary, hidden)
    yield "bert.embeddings.position_embeddings.weight", (512, hidden)
    yield "bert.embeddings.token_type_embeddings.weight", (2, hidden)
    yield from affine("bert.embeddings.LayerNorm", hidden)
    for layer in range(what.layers):
        prefix = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from affine(f"{prefix}.attention.self.{part}", hidden, hidden)
        yield from affine(f"{prefix}.attention.output.dense", hidden, hidden)
        yield from affine(f"{prefix}.attention.output.LayerNorm", hidden)
        yield from affine(f"{prefix}.intermediate.dense", intermediate, hidden)
        yield from affine(f"{prefix}.output.dense", hidden, intermediate)
        yield from affine(f"{prefix}.output.LayerNorm", hidden)
    yield from affine("bert.pooler.dense", hidden, hidden)
    yield from affine("classifier", 2, hidden)


def affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def write_checkpoint(what: Checkpoints, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    is_llama = what.architecture.startswith("Llama")
    config = {
        "architectures": [what.architecture],
        "model_type": "llama" if is_llama else "bert",
        "hidden_size": what.hidden,
        "intermediate_size": what.intermediate,
        "num_hidden_layers": what.layers,
        "num_attention_heads": what.heads,
        "vocab_size": what.vocabulary,
        "max_position_embeddings": 512,
        "torch_dtype": what.dtype,
    }
    if is_llama:
        config |= {"num_key_value_heads": what.heads, "tie_word_embeddings": False}
    write_json(folder / "config.json", config)
    # The smallest tokenizer that loads: tools copy its files beside the merged weights.
    write_json(
        folder / "tokenizer.json",
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}},
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def build_adapters(what: Adapters, folder: Path) -> None:
    # With B of this scale, s B A has entries of about the size of a task vector.
    b_std = DELTA_STD / (WEIGHT_STD * what.rank**0.5 * what.alpha / what.rank)
    for task in range(what.tasks):
        tensors = {}
        for module, name in enumerate(adapter_modules(what)):
            down = normal((what.rank, what.hidden), WEIGHT_STD, what.seed, task, 2 * module)
            up = normal((what.hidden, what.rank), b_std, what.seed, task, 2 * module + 1)
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        target = folder / f"task{task}"
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(
            target / "adapter_config.json",
            {
                "peft_type": "LORA",
                "base_model_name_or_path": "synthetic",
                "r": what.rank,
                "lora_alpha": what.alpha,
                "target_modules": sorted({name.rpartition(".")[2] for name in adapter_modules(what)}),
                "bias": "none",
                "inference_mode": True,
            },
        )


def adapter_modules(what: Adapters) -> list[str]:
    """Names of the layers an adapter changes, `what.modules` of them."""
    return [f"layers.{index // 2}.{'qv'[index % 2]}_proj" for index in range(what.modules)]


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(*CHECKPOINTS, "adapters"))
    parser.add_argument("folder", type=Path, help="new or empty folder")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers and of the vocabulary")
    options = parser.parse_args()
    if options.kind == "adapters":
        build(Adapters(), options.folder)
        return
    what = CHECKPOINTS[options.kind].scaled(options.scale)
    build(what, options.folder)
    print(f"{sum(map(math.prod, shapes_of(what).values())):,} parameters per model")


if __name__ == "__main__":
    main()
