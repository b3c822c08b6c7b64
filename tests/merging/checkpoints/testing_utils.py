"""Small checkpoints on disk."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from ..testing_utils import random_vectors


SHAPES = {
    "model.embed_tokens.weight": (40, 6),
    "model.layers.0.mlp.weight": (12, 7),
    "model.layers.0.mlp.bias": (12,),
    "model.layers.0.norm.weight": (6,),
    "model.layers.1.conv.weight": (3, 2, 2, 2),
    "model.scale": (),
}


def write_checkpoint(folder, tensors, config=None, shards=1):
    """A folder with config.json and one or more safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy", "dtype": "float32"}))
    keys = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in keys[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_models(root, count=3, dtype=torch.float32, shapes=SHAPES, shards=1, config=None):
    """`count` models and a base near them, with an integer buffer; returns recipe parts."""
    base = random_vectors(1, shapes, seed=9, dtype=dtype)[0]
    base["ids"] = torch.arange(5)
    write_checkpoint(root / "base", base, config, shards)
    for index, delta in enumerate(random_vectors(count, shapes, seed=3)):
        tensors = {key: (base[key].float() + 0.1 * delta[key]).to(dtype) for key in shapes}
        write_checkpoint(root / f"m{index}", {**tensors, "ids": torch.arange(5)}, config, shards)
    return {
        "base_model": str(root / "base"),
        "models": [{"model": str(root / f"m{index}")} for index in range(count)],
    }


def load_checkpoint(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
