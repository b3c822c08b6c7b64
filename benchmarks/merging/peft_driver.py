"""Merges adapters with PEFT's `add_weighted_adapter`; runs in PEFT's environment.

    python benchmarks/merging/peft_driver.py RECIPE.yaml OUT

PEFT needs a base model around the adapters: here empty layers of the right shapes, whose weights are never read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from recipe_files import read_recipe
from safetensors import safe_open
from torch import nn


def empty_base(adapter: Path) -> nn.Module:
    """Modules with the names and shapes that the adapter's factors ask for."""
    base = nn.Module()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():
            if not name.endswith(".lora_A.weight"):
                continue
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
            inputs = file.get_slice(name).get_shape()[1]
            outputs = file.get_slice(name.replace("lora_A", "lora_B")).get_shape()[0]
            parent = base
            for part in path[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(path[-1], nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False))
    return base


@torch.no_grad()
def main(recipe_path: str, output: str) -> None:
    recipe = read_recipe(recipe_path)
    folders = [model["model"] for model in recipe["models"]]
    names = [Path(folder).name for folder in folders]
    model = PeftModel.from_pretrained(empty_base(Path(folders[0])), folders[0], adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    weights = [entry["parameters"]["weight"] for entry in recipe["models"]]
    model.add_weighted_adapter(names, weights, "merged", **recipe["parameters"])
    model.save_pretrained(output, selected_adapters=["merged"])


if __name__ == "__main__":
    main(*sys.argv[1:])
