"""The matrices that alignment compares, cut from the models' tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .spec import Group, PermutationSpec, View


# Float64 copies are made in pieces of this many entries.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Block:
    """
    One matrix per model, whose rows one index vector orders and whose columns another one or none.

    Args:
        rows (`str`): index vector of the rows.
        columns (`str` or `None`): index vector of the columns.
        matrices (`list[Tensor]`): by model, shape (rows, columns, rest), or (rows, rest) without `columns`.
    """

    rows: str
    columns: str | None
    matrices: list[Tensor]


@dataclass(frozen=True)
class Problem:
    """
    What is maximised: the sum over pairs of models and blocks of the inner products in the universe.

    Args:
        groups (`Mapping[str, Flat | Heads]`): the groups that some block has.
        sizes (`Mapping[str, int]`): sizes of their index vectors.
        blocks (`list[Block]`): the matrices.
    """

    groups: Mapping[str, Group]
    sizes: Mapping[str, int]
    blocks: list[Block]

    @property
    def count(self) -> int:
        """Number of models."""
        return len(self.blocks[0].matrices)

    def variables_of(self, group: str) -> list[str]:
        """Index vectors of a group."""
        return [name for name in self.sizes if name.partition(":")[0] == group]

    def touching(self, group: str) -> list[int]:
        """Indices of the blocks that a group orders."""
        names = set(self.variables_of(group))
        return [index for index, block in enumerate(self.blocks) if {block.rows, block.columns} & names]

    def together(self, order: Sequence[str]) -> list[list[str]]:
        """Groups in a given order, cut into runs whose members share no block: their best orders are independent."""
        runs: list[list[str]] = []
        busy: set[int] = set()
        for name in order:
            touching = set(self.touching(name))
            if not runs or touching & busy:
                runs.append([])
                busy = set()
            runs[-1].append(name)
            busy |= touching
        return runs

    def identity(self) -> dict[str, np.ndarray]:
        """Index vectors that leave every unit in its place."""
        return {name: np.arange(size) for name, size in self.sizes.items()}


def build_problem(
    spec: PermutationSpec, states: Sequence[Mapping[str, Tensor]], names: Iterable[str], device: torch.device | None
) -> Problem:
    """
    Cuts tensors into blocks; those that the same index vectors order become one block.

    Args:
        spec ([`PermutationSpec`]): axes of every tensor.
        states (`Sequence[Mapping[str, Tensor]]`): the models.
        names (`Iterable[str]`): tensors to compare.
        device (`torch.device`, *optional*): where to put the blocks; by default where the tensors are.
    """
    parts: dict[tuple[str, str | None], list[list[Tensor]]] = {}
    for name in sorted(names):
        cuts = [_cut(spec, name, state[name].detach().to(device)) for state in states]
        for pieces in zip(*cuts, strict=True):
            parts.setdefault(pieces[0][0], []).append([piece for _, piece in pieces])
    blocks = [
        Block(rows, columns, [torch.cat(list(pieces), dim=-1).contiguous() for pieces in zip(*members, strict=True)])
        for (rows, columns), members in sorted(parts.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    ]
    used = {name.partition(":")[0] for block in blocks for name in (block.rows, block.columns) if name}
    groups = {name: group for name, group in sorted(spec.groups.items()) if name in used}
    sizes = {name: size for name, size in spec.variables.items() if name.partition(":")[0] in used}
    return Problem(groups, sizes, blocks)


def _cut(spec: PermutationSpec, name: str, tensor: Tensor) -> list[tuple[tuple[str, str | None], Tensor]]:
    """The pieces of a tensor with the index vectors of their rows and columns."""
    pieces: list[tuple[Tensor, list[View | None]]] = [(tensor.to(_product_dtype(tensor)), [])]
    for dim, axis in enumerate(spec.axes_of(name, tensor.ndim)):
        views = spec.views(axis)
        if not views:
            pieces = [(piece, [*known, None]) for piece, known in pieces]
            continue
        sizes = [view.size for view in views]
        pieces = [
            (part, [*known, view])
            for piece, known in pieces
            for part, view in zip(piece.split(sizes, dim), views, strict=True)
        ]
    return [_as_matrix(piece, known) for piece, known in pieces if any(known)]


def _as_matrix(piece: Tensor, views: Sequence[View | None]) -> tuple[tuple[str, str | None], Tensor]:
    shape: list[int] = []
    units: list[tuple[str, list[int]]] = []
    rest: list[int] = []
    for size, view in zip(piece.shape, views, strict=True):
        if view is None:
            rest.append(len(shape))
            shape.append(size)
        else:
            first = len(shape)
            shape += [view.outer, view.expand, view.inner]
            units.append((view.variable, [first, first + 2]))
            rest.append(first + 1)
    # A transposed pair, as of a layer in and a layer out, goes into one block.
    units.sort(key=lambda unit: unit[0])
    order = [dim for _, dims in units for dim in dims] + rest
    sizes = [shape[dims[0]] * shape[dims[1]] for _, dims in units]
    matrix = piece.reshape(shape).permute(order).reshape(*sizes, -1)
    return (units[0][0], units[1][0] if len(units) > 1 else None), matrix


def _product_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def reorder(matrix: Tensor, vector: np.ndarray, dim: int) -> Tensor:
    """The matrix seen from the universe along one dimension: `P^T W` for rows, `W P` for columns."""
    order = torch.from_numpy(np.argsort(vector)).to(matrix.device)
    return matrix.index_select(dim, order)


def in_universe(block: Block, model: int, vectors: Mapping[str, np.ndarray]) -> Tensor:
    """A model's matrix of a block, seen from the universe."""
    matrix = reorder(block.matrices[model], vectors[block.rows], 0)
    return matrix if block.columns is None else reorder(matrix, vectors[block.columns], 1)


def row_scores(left: Tensor, right: Tensor) -> np.ndarray:
    """`left right^T` over all but the rows, float64: the gradient with respect to the permutation of rows."""
    return _double(left.reshape(len(left), -1) @ right.reshape(len(right), -1).T)


def column_scores(left: Tensor, right: Tensor) -> np.ndarray:
    """The same over all but the columns."""
    return row_scores(left.transpose(0, 1), right.transpose(0, 1))


def _double(matrix: Tensor) -> np.ndarray:
    return matrix.double().cpu().numpy()


def gram(matrices: Sequence[Tensor]) -> np.ndarray:
    """Inner products of some tensors of one shape, in float64."""
    flat = [matrix.reshape(-1) for matrix in matrices]
    size = flat[0].numel()
    piece = torch.empty(len(flat), min(_CHUNK, size), dtype=torch.float64, device=flat[0].device)
    result = np.zeros((len(flat), len(flat)))
    for start in range(0, size, _CHUNK):
        rows = piece[:, : min(_CHUNK, size - start)]
        for row, vector in zip(rows, flat, strict=True):
            row.copy_(vector[start : start + _CHUNK])
        result += _double(rows @ rows.T)
    return result


def total(matrices: Iterable[Tensor]) -> Tensor:
    """Sum of the models' matrices, always in the same order."""
    first, *rest = matrices
    result = first.clone()
    for matrix in rest:
        result.add_(matrix)
    return result


def pair_sum(matrices: Sequence[Tensor]) -> float:
    """Sum of the inner products of all pairs, in time linear in their number."""
    # ||S||^2 holds every square once and every pair twice.
    return float(0.5 * (gram([total(matrices)])[0, 0] - sum(gram([matrix])[0, 0] for matrix in matrices)))


def objective(problem: Problem, vectors: Sequence[Mapping[str, np.ndarray]]) -> float:
    """The objective at permutations: half of `sum_l (||S_l||^2 - sum_p ||W_l^p||^2)`, S the sum of the models."""
    models = range(problem.count)
    return sum(pair_sum([in_universe(block, model, vectors[model]) for model in models]) for block in problem.blocks)
