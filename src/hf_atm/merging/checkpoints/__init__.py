"""Merging checkpoints that do not fit into memory."""

from __future__ import annotations

from .merge import CheckpointMerge, merge_checkpoints
from .reader import CheckpointReader, resolve_model
from .recipe import MergeRecipe, RecipeModel, read_recipe


__all__ = [
    "CheckpointMerge",
    "CheckpointReader",
    "MergeRecipe",
    "RecipeModel",
    "merge_checkpoints",
    "read_recipe",
    "resolve_model",
]
