"""One door for recipes: checkpoints go to the out-of-core merge, adapters to the adapter merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub import check_upload, push
from .checkpoints.merge import CheckpointMerge, merge_checkpoints
from .checkpoints.processes import Processes
from .checkpoints.reader import is_adapter, resolve_model
from .checkpoints.recipe import DTYPES, MergeRecipe, read_recipe, with_dtype
from .checkpoints.staging import check_output


if TYPE_CHECKING:
    from .adapters import AdapterMerge

# What has no meaning for adapters: keys that differ from these defaults, and options.
_OF_CHECKPOINTS = {
    "exclude": [],
    "task_specific_modules": [],
    "postprocess": [],
    "copy_code": False,
    "buffers": "pooled",
    "vocab_policy": "error",
    "tokenizer_source": "base",
}
_OPTIONS = {"device": None, "threads": None, "reload": None, "max_shard_size": "5GB"}


def merge_recipe(
    recipe: str | os.PathLike | Mapping[str, Any] | MergeRecipe, output_dir: str | os.PathLike, **options: Any
) -> CheckpointMerge | AdapterMerge:
    """
    Merges what a recipe names: whole checkpoints or, if every model is a PEFT adapter, adapters.

    Args:
        recipe: as in [`merge_checkpoints`]. For adapters, its key `adapters` holds keywords of [`merge_adapters`], such as
            `{output: svd, svd_rank: 16}`.
        output_dir (`str`): folder for the result.
        **options: as in [`merge_checkpoints`]; adapters know `out_dtype`, `dry_run`, `overwrite`, `push_to_hub`, `private`
            and `progress`. Of several processes, one merges adapters.

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
    if recipe.align or options.get("align"):
        raise ValueError(
            "Recipe key 'align' is for whole models: adapters of one base share its order of units, and adapters of "
            "several bases must be merged into them first; remove it."
        )
    if len(adapters) < len(folders):
        raise ValueError(
            f"{', '.join(adapters)}: adapters, beside whole checkpoints; merge adapters into their base model first, or "
            "list adapters only."
        )
    return _merge_adapters(recipe, folders, output_dir, options)


def _merge_adapters(
    recipe: MergeRecipe, folders: list[Path], output_dir: str | os.PathLike, options: Mapping[str, Any]
) -> AdapterMerge:
    from .adapters import merge_adapters
    from .adapters.folder import check_task_names

    foreign = [key for key, default in _OF_CHECKPOINTS.items() if getattr(recipe, key) != default]
    if foreign:
        raise ValueError(f"Recipe key '{foreign[0]}' has no meaning for adapters; remove it.")
    unused = [key for key, default in _OPTIONS.items() if options.get(key, default) != default]
    if unused:
        raise ValueError(f"{unused[0]}={options[unused[0]]!r} has no meaning for adapters; leave it out.")
    processes, output, hub = Processes(), Path(output_dir).resolve(), options.get("push_to_hub")
    processes.on_main(check_output, output, bool(options.get("overwrite")), folders)
    names = [model.name for model in recipe.models]
    if recipe.adapters.get("heads") == "separate":
        check_task_names(names)
    settings = {"names": names, "strict": recipe.strict, **recipe.parameters, **recipe.adapters}
    if options.get("out_dtype") is not None:
        recipe = with_dtype(recipe, options["out_dtype"])
    if recipe.out_dtype is not None:
        settings["dtype"] = DTYPES[recipe.out_dtype]
    if hub and not options.get("dry_run"):
        processes.on_main(check_upload, hub)
    result = merge_adapters(folders, recipe.merge_method, [model.weight for model in recipe.models], **settings)
    if options.get("dry_run"):
        return result
    processes.on_main(result.save_pretrained, output)
    if hub:
        processes.on_main(push, output, hub, options.get("private", True))
    return result
