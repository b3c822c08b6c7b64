"""What the drivers share: whole models read from the folders that a recipe names, and a result written to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor


State = dict[str, Tensor]


def read_recipe(path: str) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def read_models(recipe: dict[str, Any]) -> tuple[State, list[State]]:
    """Base and models in the recipe's working type."""
    dtype = getattr(torch, recipe["dtype"])
    folders = [recipe["base_model"], *(model["model"] for model in recipe["models"])]
    base, *models = (
        {name: tensor.to(dtype) for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
        for folder in folders
    )
    return base, models


def write_model(recipe: dict[str, Any], tensors: State, output: str) -> None:
    dtype = getattr(torch, recipe["out_dtype"])
    Path(output).mkdir(parents=True)
    rounded = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, Path(output) / "model.safetensors", metadata={"format": "pt"})
