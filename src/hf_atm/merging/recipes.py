"""One door for recipes: checkpoints go to the out-of-core merge, adapters to the adapter merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints.merge import CheckpointMerge, merge_checkpoints
from .checkpoints.reader import is_adapter, resolve_model
from .checkpoints.recipe import DTYPES, MergeRecipe, read_recipe
from .checkpoints.staging import check_output
from .hub import check_upload, push


if TYPE_CHECKING:
    from .adapters import AdapterMerge

_OF_CHECKPOINTS = ("exclude", "task_specific_modules", "postprocess", "copy_code")


def merge_recipe(
    recipe: str | os.PathLike | Mapping[str, Any] | MergeRecipe, output_dir: str | os.PathLike, **options: Any
) -> CheckpointMerge | AdapterMerge:
    """
    Merges what a recipe names: whole checkpoints or, if every model is a PEFT adapter, adapters.

    Args:
        recipe: as in [`merge_checkpoints`]. For adapters, its key `adapters` holds keywords of [`merge_adapters`], such as
            `{output: svd, svd_rank: 16}`.
        output_dir (`str`): folder for the result.
        **options: as in [`merge_checkpoints`]; adapters know `dry_run`, `overwrite`, `push_to_hub` and
            `private`.

    Returns:
        [`CheckpointMerge`] or [`AdapterMerge`]

    Raises:
        `ValueError`: if some models are adapters and others are not, and whatever the two merges raise.
    """
    recipe = read_recipe(recipe)
    folders = [resolve_model(model.model, model.revision) for model in recipe.models]
    adapters = [model.name for model, folder in zip(recipe.models, folders, strict=True) if is_adapter(folder)]
    if not adapters:
        if recipe.adapters:
            raise ValueError("Recipe key 'adapters' is for adapters, and no model is one; remove it.")
        return merge_checkpoints(recipe, output_dir, **options)
    if len(adapters) < len(folders):
        raise ValueError(
            f"{', '.join(adapters)}: adapters, beside whole checkpoints; merge adapters into their base model first, or "
            "list adapters only."
        )
    return _merge_adapters(recipe, folders, output_dir, options)


def _merge_adapters(
    recipe: MergeRecipe, folders: list[Path], output_dir: str | os.PathLike, options: Mapping[str, Any]
) -> AdapterMerge:
    from .adapters import merge_adapter_folders, merge_adapters

    foreign = [key for key in _OF_CHECKPOINTS if getattr(recipe, key)]
    if foreign:
        raise ValueError(f"Recipe key '{foreign[0]}' has no meaning for adapters; remove it.")
    check_output(Path(output_dir), bool(options.get("overwrite")))
    names = [model.name for model in recipe.models]
    weights = [model.weight for model in recipe.models]
    settings = {"names": names, **recipe.parameters, **recipe.adapters}
    if recipe.out_dtype is not None:
        settings["dtype"] = DTYPES[recipe.out_dtype]
    if options.get("dry_run"):
        return merge_adapters(folders, recipe.merge_method, weights, **settings)
    if options.get("push_to_hub"):
        check_upload(options["push_to_hub"])
    result = merge_adapter_folders(folders, output_dir, weights=weights, method=recipe.merge_method, **settings)
    if options.get("push_to_hub"):
        push(output_dir, options["push_to_hub"], options.get("private", True))
    return result
