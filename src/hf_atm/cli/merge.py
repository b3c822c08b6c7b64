"""`hf-atm merge`: checkpoints or adapters, from a recipe. Imports neither transformers nor peft unless it must."""

from __future__ import annotations

import os
from typing import Any

from .console import size


def merge(recipe: str, output: str, options: Any, quiet: bool = False) -> int:
    """Merges what a recipe names and prints what came of it.

    Args:
        recipe (`str`): YAML or JSON file.
        output (`str`): Folder for the result.
        options (`argparse.Namespace`): The command's options.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar and no summary.

    Returns:
        `int`: 0.
    """
    from ..merging.recipes import merge_recipe

    result = merge_recipe(
        recipe,
        output,
        max_shard_size=options.max_shard_size,
        out_dtype=options.out_dtype,
        align=options.align,
        dry_run=options.dry_run,
        device=options.device,
        threads=options.threads,
        reload=True if options.reload else None,
        overwrite=options.overwrite,
        push_to_hub=options.push_to_hub,
        private=not options.public,
        progress=not quiet,
    )
    if not quiet and os.environ.get("RANK", "0") == "0":
        adapters = not hasattr(result, "nbytes")
        print(describe_adapters(result, output, options.dry_run) if adapters else describe(result))
    return 0


def describe(result: Any) -> str:
    """A finished or planned merge of checkpoints in a few lines.

    Args:
        result ([`CheckpointMerge`]): What the merge returned.
    """
    types = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sorted(result.dtypes.items()))
    lines = [
        f"{result.method}: {', '.join(result.models)}",
        f"{result.tensors} tensors ({result.merged} merged, {result.copied} taken over), entries: {types}",
    ]
    if result.alignment:
        before, after = result.alignment["objective_before"], result.alignment["objective_after"]
        lines.append(
            f"aligned by {result.alignment['method']}: inner products of the weights {before:.4g} -> {after:.4g}"
        )
    if result.dry_run:
        shapes = [f"  {key} {'x'.join(map(str, shape)) or 'scalar'}" for key, shape in result.shapes.items()]
        lines += shapes
        lines += [
            f"files: {', '.join(result.files)}, {size(result.nbytes)}",
            f"beside them: {', '.join(result.side_files) or 'nothing'}",
            f"needs {size(result.disk_bytes)} of disk and about {size(result.peak_bytes)} of memory beside the "
            "interpreter's; nothing was written",
        ]
    else:
        resumed = "continued and " if result.resumed else ""
        lines.append(f"{resumed}written to {result.output_dir}: {', '.join(result.files)}, {size(result.nbytes)}")
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def describe_adapters(result: Any, output: str, dry_run: bool) -> str:
    """A merge of adapters in a few lines.

    Args:
        result ([`AdapterMerge`]): What the merge returned.
        output (`str`): The folder.
        dry_run (`bool`): Whether it was only tried.
    """
    report = result.report
    ranks = sorted(module["rank"] for module in report["modules"].values())
    lines = [
        f"{report['method']}: {', '.join(entry['name'] for entry in report['inputs'])}",
        # Dense updates have no ranks.
        f"{len(ranks)} modules, ranks {ranks[0]} to {ranks[-1]}, lost energy {report['lost_energy']:.2%}"
        if ranks
        else f"{len(result.deltas)} dense updates",
        *(f"{name}: {fate}" for name, fate in sorted(report["saved"].items())),
        "nothing was written" if dry_run else f"written to {output}",
    ]
    return "\n".join(lines)
