"""TSV-M and Iso-C as the papers write them, with plain singular value decompositions.

    python benchmarks/merging/plain_svd.py RECIPE.yaml OUT

The recipe's `dtype` is the working type: float32 to be timed, float64 for a reference.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

import torch
from recipe_files import read_models, read_recipe, write_model
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix)
    return left @ right


def tsv_m(matrices: list[Tensor]) -> Tensor:
    """Leading r / T triplets of each task, both sides made orthonormal together, singular values unchanged."""
    count = min(matrices[0].shape) // len(matrices)
    lefts, values, rights = zip(*map(svd, matrices), strict=True)
    left = polar(torch.cat([part[:, :count] for part in lefts], dim=1))
    right = polar(torch.cat([part[:count] for part in rights]))
    return left * torch.cat([part[:count] for part in values]) @ right


def iso_c(matrices: list[Tensor]) -> Tensor:
    """The sum with all singular values equal to their mean."""
    left, values, right = svd(torch.stack(matrices).sum(0))
    return left @ right * values.mean()


METHODS = {"tsv_m": tsv_m, "iso_c": iso_c}


@torch.no_grad()
def main(recipe_path: str, output: str) -> None:
    recipe = read_recipe(recipe_path)
    base, models = read_models(recipe)
    method, others = METHODS[recipe["merge_method"]], recipe["parameters"]["non_matrix"]
    for name, tensor in base.items():
        task_vectors = [model[name] - tensor for model in models]
        is_matrix = tensor.ndim == 2 and not any(fnmatchcase(name, pattern) for pattern in others)
        base[name] = tensor + (method(task_vectors) if is_matrix else torch.stack(task_vectors).mean(0))
    write_model(recipe, base, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
