"""One door for recipes: checkpoints go to the out-of-core merge, adapters to the adapter merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checkpoints.merge import CheckpointMerge, merge_checkpoints, push
from .checkpoints.reader import is_adapter, resolve_model
from .checkpoints.recipe import MergeRecipe, read_recipe


if TYPE_CHECKING:
    from .adapters import AdapterMerge


def merge_recipe(
    recipe: str | os.PathLike | Mapping[str, Any] | MergeRecipe, output_dir: str | os.PathLike, **options: Any
) -> CheckpointMerge | AdapterMerge:
    """
    Merges what a recipe names: whole checkpoints or, if every model is a PEFT adapter, adapters.

    Args:
        recipe: as in [`merge_checkpoints`]. For adapters, its key `adapters` holds keywords of [`merge_adapters`], such as
            `{output: svd, svd_rank: 16}`.
        output_dir (`str`): folder for the result.
        **options: as in [`merge_checkpoints`]; adapters know `dry_run`, `push_to_hub` and `private`.

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
    recipe: MergeRecipe, folders: list[Any], output_dir: str | os.PathLike, options: Mapping[str, Any]
) -> AdapterMerge:
    from .adapters import merge_adapter_folders, merge_adapters

    names = [model.name for model in recipe.models]
    weights = [model.weight for model in recipe.models]
    settings = {**recipe.parameters, **recipe.adapters, "names": names}
    if options.get("dry_run"):
        return merge_adapters(folders, recipe.merge_method, weights, **settings)
    result = merge_adapter_folders(folders, output_dir, weights=weights, method=recipe.merge_method, **settings)
    if options.get("push_to_hub"):
        push(output_dir, options["push_to_hub"], options.get("private", True))
    return result
