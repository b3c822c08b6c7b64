"""`hf-atm inspect`: how the task vectors of finished models lie to each other."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ..analysis.checkpoints import open_task_vectors
from ..analysis.diagnose import Diagnosis, diagnose
from ..checkpoint import write_json


_LAYERS = 10


def inspect(
    base: str,
    models: Sequence[str],
    names: Sequence[str] | None,
    level: str,
    exclude: Sequence[str],
    output: str | None,
    quiet: bool = False,
) -> int:
    """Prints the diagnosis of models against their base.

    Args:
        base, models, names, exclude: see [`open_task_vectors`].
        level (`str`): see [`diagnose`].
        output (`str`, *optional*): JSON file that takes everything, tensor by tensor.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar.

    Returns:
        `int`: 0.
    """
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise ValueError(f"--output {output!r} lies in a folder that does not exist; make it first.")
    started = time.perf_counter()
    vectors, skipped = open_task_vectors(base, models, names, exclude)
    with tqdm(
        total=len(next(iter(vectors.values()))), unit="tensor", disable=True if quiet else None, desc="inspecting"
    ) as bar:
        result = diagnose(vectors, level=level, report=lambda name: bar.update(), threads=os.cpu_count() or 1)
    print(describe(result, skipped))
    if output is not None:
        write_json(Path(output), {"base": base, "models": list(models), "skipped": skipped, **result.to_dict()})
    if not quiet:
        print(f"\n{time.perf_counter() - started:.0f} s" + (f"; all tensors are in {output}" if output else ""))
    return 0


def describe(result: Diagnosis, skipped: Sequence[str] = ()) -> str:
    """A diagnosis as text: tasks, the whole, and the tensors where tasks interfere most."""
    tasks = result.tasks
    width, cell = max(len("task"), *map(len, tasks)), max(8, *map(len, tasks))
    header = f"{'task':<{width}}  {'norm':>8}  " + "  ".join(f"{task:>{cell}}" for task in tasks)
    lines = [
        header + ("   aligned" if result.alignment else ""),
        "-" * (len(header) + (10 if result.alignment else 0)),
    ]
    for task in tasks:
        row = "  ".join(f"{result.cosines[task][other]:>{cell}.4f}" for other in tasks)
        aligned = f"  {result.alignment[task]:>8.4f}" if result.alignment else ""
        lines.append(f"{task:<{width}}  {result.norms[task]:>8.4g}  {row}{aligned}")
    lines.append("")
    facts = [
        ("norm dispersion (largest / smallest)", result.norm_dispersion, ".3f"),
        ("entries that two tasks count among their largest fifth", result.sign_overlap, ".2%"),
        ("entries where their signs differ there", result.sign_conflict, ".2%"),
        ("singular task interference, mean over matrices", result.interference, ".4g"),
        ("effective rank of the sum, mean over matrices", result.effective_rank, ".1f"),
    ]
    lines += [f"{name}: {value:{form}}" for name, value, form in facts if value is not None]
    found = {name: layer for name, layer in result.layers.items() if layer.interference is not None}
    if found:
        worst = sorted(found, key=lambda name: (-(found[name].interference or 0.0), name))[:_LAYERS]
        longest = max(map(len, worst))
        head = f"{'most interference':<{longest}}  {'STI':>9}  {'cosine':>8}  {'conflict':>8}  {'rank':>7}"
        lines += ["", head, "-" * len(head)]
        for name in worst:
            layer = found[name]
            lines.append(
                f"{name:<{longest}}  {layer.interference:>9.4g}  {layer.cosine:>8.4f}  {layer.sign_conflict:>8.2%}  "
                f"{layer.effective_rank:>7.1f}"
            )
    if skipped:
        shown = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        lines += ["", f"not in all models in one shape, or no weights: {shown}"]
    return "\n".join(lines)
