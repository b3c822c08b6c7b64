"""The least a merge can cost: read the models, add them up one precision higher, write the result; nothing else.

    python benchmarks/merging/floor.py RECIPE.yaml OUT

Task arithmetic as one weighted sum, `(1 - sum(w)) base + sum_t w_t model_t`, in float32 for half types and in float64
for float32, by pieces that stay in the cache. Two threads take tensors in turn and write each to its place in the file
at once, so that the result never lies in memory. No checks, no side files: a bound to compare with, not a tool.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from safetensors import safe_open


THREADS = 2
PIECE = 2**18


def main(recipe_path: str, output: str) -> None:
    recipe = yaml.safe_load(Path(recipe_path).read_text(encoding="utf-8"))
    weights = [model["parameters"]["weight"] for model in recipe["models"]]
    weights = [1.0 - sum(weights), *weights]
    folders = [recipe["base_model"], *(model["model"] for model in recipe["models"])]
    files = [safe_open(Path(folder) / "model.safetensors", "pt") for folder in folders]
    torch.set_num_threads(1)

    Path(output).mkdir(parents=True)
    with open(Path(folders[0]) / "model.safetensors", "rb") as source:
        length = struct.unpack("<Q", source.read(8))[0]
        header = source.read(length)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
    target = os.open(Path(output) / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o644)
    os.pwrite(target, struct.pack("<Q", length) + header, 0)

    def merge(name: str) -> None:
        inputs = [file.get_tensor(name).flatten() for file in files]
        result = torch.empty_like(inputs[0])
        wider = torch.float64 if result.dtype == torch.float32 else torch.float32
        total, term = (torch.empty(min(PIECE, result.numel()), dtype=wider) for _ in range(2))
        for start in range(0, result.numel(), PIECE):
            pieces = [tensor[start : start + PIECE] for tensor in inputs]
            total, term = total[: pieces[0].numel()], term[: pieces[0].numel()]
            total.copy_(pieces[0]).mul_(weights[0])
            for piece, weight in zip(pieces[1:], weights[1:], strict=True):
                total.add_(term.copy_(piece), alpha=weight)
            result[start : start + PIECE] = total
        os.pwrite(target, result.view(torch.uint8).numpy(), 8 + length + places[name][0])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(merge, sorted(places, key=lambda name: places[name][0])))
    os.close(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
