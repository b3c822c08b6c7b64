"""Points of the relaxed problem: convex mixtures of permutations, kept as their history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .assignment import best_permutation
from .problem import Block, Problem, reorder
from .spec import Heads
from .workers import Map


Vectors = Mapping[str, np.ndarray]

# Index vectors of every model; None is the barycentre of all admissible permutations.
Atom = Sequence[Vectors | None]


class Mixture:
    """
    One doubly stochastic matrix `P = sum_j w_j D_j` per model and index vector, and the matrices seen through it.

    Dense matrices are made one at a time and only when asked for: gradients, gap and line search do without.

    Args:
        problem ([`Problem`]): the blocks.
        atoms (`Sequence[tuple[float, Atom]]`): weights, which sum to one, and permutations.

    Attributes:
        seen (`list[list[Tensor]]`): by block and model `P_rows^T W P_columns`.
        right (`list[list[Tensor]]`): `W P_columns`; the matrices themselves in a block without columns.
        left (`list[list[Tensor]]`): `P_rows^T W`.
    """

    def __init__(self, problem: Problem, atoms: Sequence[tuple[float, Atom]]) -> None:
        self.problem = problem
        self.atoms = list(atoms)
        self.seen: list[list[Tensor]] = []
        self.right: list[list[Tensor]] = []
        self.left: list[list[Tensor]] = []
        for block in problem.blocks:
            models = range(problem.count)
            left = [self._mixed(block.matrices[model], block.rows, 0, model) for model in models]
            if block.columns is None:
                right, seen = block.matrices, left
            else:
                right = [self._mixed(block.matrices[model], block.columns, 1, model) for model in models]
                seen = [self._mixed(right[model], block.rows, 0, model) for model in models]
            self.seen.append(list(seen))
            self.right.append(list(right))
            self.left.append(list(left))

    def _mixed(self, matrix: Tensor, variable: str, dim: int, model: int) -> Tensor:
        result = torch.zeros_like(matrix)
        for weight, atom in self.atoms:
            vectors = atom[model]
            moved = (
                self._averaged(matrix, variable, dim) if vectors is None else reorder(matrix, vectors[variable], dim)
            )
            result.add_(moved, alpha=weight)
        return result

    def _averaged(self, matrix: Tensor, variable: str, dim: int) -> Tensor:
        """The matrix times the barycentre: a mean over all units, or over heads where their inside is fixed."""
        inner = self._fixed_inside(variable)
        if inner == 1:
            return matrix.mean(dim, keepdim=True).expand_as(matrix)
        split = matrix.unflatten(dim, (-1, inner))
        return split.mean(dim, keepdim=True).expand_as(split).flatten(dim, dim + 1)

    def _fixed_inside(self, variable: str) -> int:
        name, _, kind = variable.partition(":")
        group = self.problem.groups[name]
        fixed = isinstance(group, Heads) and not (group.qk_inner if kind == "qk" else group.v_inner)
        return group.dim if isinstance(group, Heads) and fixed else 1

    def advance(self, step: float, direction: Sequence[Vectors], seen: list[list[Tensor]], pool: Map) -> None:
        """Moves by a step towards permutations, at which point the blocks look like `seen`."""
        if step == 1:
            self.atoms = []
        self.atoms = [(weight * (1 - step), atom) for weight, atom in self.atoms] + [(step, list(direction))]

        def move(place: tuple[int, int]) -> None:
            index, model = place
            block: Block = self.problem.blocks[index]
            if block.columns is None:
                self.left[index][model] = seen[index][model]
                return
            matrix, vectors = block.matrices[model], direction[model]
            self.right[index][model].mul_(1 - step).add_(reorder(matrix, vectors[block.columns], 1), alpha=step)
            self.left[index][model].mul_(1 - step).add_(reorder(matrix, vectors[block.rows], 0), alpha=step)

        pool(move, [(index, model) for index in range(len(self.seen)) for model in range(self.problem.count)])
        self.seen = seen

    def dense(self, variable: str, model: int) -> np.ndarray:
        """The doubly stochastic matrix of an index vector, float64."""
        size = self.problem.sizes[variable]
        result = np.zeros((size, size))
        for weight, atom in self.atoms:
            vectors = atom[model]
            if vectors is None:
                inner = self._fixed_inside(variable)
                result += np.kron(np.ones((size // inner, size // inner)), np.eye(inner)) * (weight * inner / size)
            else:
                result[np.arange(size), vectors[variable]] += weight
        return result

    def soft_maps(self, first: Vectors) -> list[dict[str, np.ndarray]]:
        """The dense matrices of all models, their columns in the order of index vectors of the first one."""
        models = range(self.problem.count)
        return [
            {name: np.ascontiguousarray(self.dense(name, model)[:, first[name]]) for name in self.problem.sizes}
            for model in models
        ]

    def rounded(self, pool: Map) -> list[dict[str, np.ndarray]]:
        """The admissible permutations nearest to the mixture, by model."""
        last = self.atoms[-1][1]
        if len(self.atoms) == 1 and all(vectors is not None for vectors in last):
            return [dict(vectors) for vectors in last if vectors is not None]
        problem = self.problem

        def nearest(place: tuple[str, int]) -> dict[str, np.ndarray]:
            name, model = place
            scores = {variable: self.dense(variable, model) for variable in problem.variables_of(name)}
            return best_permutation(name, problem.groups[name], scores)[0]

        places = [(name, model) for model in range(problem.count) for name in problem.groups]
        result: list[dict[str, np.ndarray]] = [{} for _ in range(problem.count)]
        for (_, model), vectors in zip(places, pool(nearest, places), strict=True):
            result[model] |= vectors
        return result
