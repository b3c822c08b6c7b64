"""Merges with FusionBench's functions on state dicts; runs in FusionBench's environment.

    python benchmarks/merging/fusion_bench_driver.py RECIPE.yaml OUT

FusionBench's own entry point loads models through configuration files and saves whole modules; this driver calls the
functions below it, which is less work, on files read and written with safetensors. Half-precision models are widened
first, since its decompositions need float32.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from recipe_files import State, read_models, read_recipe, write_model


def task_arithmetic(base: State, models: list[State], recipe: dict[str, Any]) -> State:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul, state_dict_sub

    total = reduce(state_dict_add, (state_dict_sub(model, base) for model in models))
    return state_dict_add(base, state_dict_mul(total, recipe["models"][0]["parameters"]["weight"]))


def ties(base: State, models: list[State], recipe: dict[str, Any]) -> State:
    from fusion_bench.method.ties_merging.ties_merging_utils import (
        state_dict_to_vector,
        ties_merging,
        vector_to_state_dict,
    )

    origin = state_dict_to_vector(base)
    task_vectors = torch.vstack([state_dict_to_vector(model) for model in models]) - origin
    merged = ties_merging(task_vectors, reset_thresh=100 * recipe["parameters"]["density"], merge_func="mean")
    return dict(vector_to_state_dict(origin + merged, base))


def tsv_m(base: State, models: list[State], recipe: dict[str, Any]) -> State:
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    return spectral(compute_and_sum_svd_mem_reduction, base, models, recipe)


def iso_c(base: State, models: list[State], recipe: dict[str, Any]) -> State:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c as merge

    return spectral(merge, base, models, recipe)


def spectral(merge: Any, base: State, models: list[State], recipe: dict[str, Any]) -> State:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_sub

    patterns = recipe["parameters"]["non_matrix"]
    excluded = [name for name in base if any(fnmatchcase(name, pattern) for pattern in patterns)]
    task_vectors = [state_dict_sub(model, base) for model in models]
    return state_dict_add(base, merge(task_vectors, accelerator="cpu", exclude_keys=excluded))


METHODS = {"task_arithmetic": task_arithmetic, "ties": ties, "tsv_m": tsv_m, "iso_c": iso_c}


@torch.no_grad()
def main(recipe_path: str, output: str) -> None:
    recipe = read_recipe(recipe_path)
    base, models = read_models(recipe)
    write_model(recipe, METHODS[recipe["merge_method"]](base, models, recipe), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
