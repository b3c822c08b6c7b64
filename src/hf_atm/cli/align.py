"""`hf-atm align`: models from different initialisations, written in one common frame."""

from __future__ import annotations

import time
from typing import Any

from ..analysis.checkpoints import distinct_names


def align_models(models: list[str], options: Any, quiet: bool = False) -> int:
    """Aligns finished models and writes them.

    Args:
        models (`list[str]`): Folders or Hub ids.
        options (`argparse.Namespace`): The command's options.
        quiet (`bool`, *optional*, defaults to `False`): Print nothing.

    Returns:
        `int`: 0.
    """
    from ..alignment.folders import align_folders

    started = time.perf_counter()
    names = options.names or [name.replace("/", "-") for name in distinct_names(models)]
    found = align_folders(
        models,
        options.out,
        names,
        options.method,
        heads=options.heads,
        device=options.device,
        seed=options.seed,
        copy_code=options.copy_code,
    )
    if not quiet:
        print(f"{options.method}: inner products of the weights, summed over pairs of models: {found.objective:.4g}")
        for name, permutation in zip(names, found.permutations, strict=True):
            total = sum(permutation.spec.variables.values())
            print(f"  {options.out}/{name}: {permutation.moved} of {total} units moved")
        print(f"{time.perf_counter() - started:.0f} s; merge the folders with hf-atm merge")
    return 0
