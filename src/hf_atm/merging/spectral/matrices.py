"""The matrices of a model, one after the other: what the methods on singular vectors are applied to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from ..elementwise.chunks import plain_sum
from ..linear import linear_coefficients
from ..tensors import CHUNK, Task, sorted_keys
from .fused import qkv_groups, split_dimension


# Rows of these tables are looked up or indexed, not multiplied: their singular vectors carry no meaning.
NON_MATRIX = (
    "*embed*",
    "*lm_head*",
    "*wte.*",
    "*wpe.*",
    "shared.weight",
    "*.shared.weight",
    "*position_bias*",
    "*relative_attention_bias*",
)


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, seen as a matrix with the first dimension for rows: `[start, stop)` along one dimension."""

    key: str
    start: int
    stop: int
    dim: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The piece, as a view where possible."""
        return tensor.flatten(1).narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class TaskMatrices:
    """
    The matrices `w_t * Delta_t` of all tasks for one weight, float64, each computed when asked for.

    Args:
        tasks (`Sequence[Task]`):
            T tasks in canonical order.
        parts (`Sequence[Part]`):
            Where the matrix lies; several parts are stacked row upon row.
    """

    tasks: Sequence[Task]
    parts: Sequence[Part]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Tensor:
        task = self.tasks[index]
        pieces = [part.of(task.tensor(part.key)) for part in self.parts]
        matrix = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(torch.float64)
        return matrix if task.weight == 1 else matrix * task.weight

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the merged matrix."""
        return self.tasks[0].dtype(self.parts[0].key)

    @property
    def product_dtype(self) -> torch.dtype:
        """Type in which the merged matrix is multiplied out of factors; it has the digits of the models' weights."""
        wide = any(task.product_dtype(self.parts[0].key) == torch.float64 for task in self.tasks)
        return torch.float64 if wide else torch.float32

    def total(self) -> Tensor:
        """Sum over the tasks, chunk by chunk where rows are whole, else with one of them in memory at a time."""
        if all(part.dim == 0 for part in self.parts):
            sums = [self._sum_of_rows(part) for part in self.parts]
            return torch.cat(sums) if len(sums) > 1 else sums[0]
        matrices = iter(self)
        total = next(matrices).clone()
        for matrix in matrices:
            total += matrix.to(total.device)
        return total

    def _sum_of_rows(self, part: Part) -> Tensor:
        shape = self.tasks[0].shape(part.key)
        width = prod(shape[1:])
        first, last = part.start * width, part.stop * width
        total: Tensor | None = None
        for start in range(first, last, CHUNK):
            stop = min(last, start + CHUNK)
            for task in self.tasks:
                chunk = task.chunk(part.key, start, stop)
                if total is None:
                    total = torch.zeros(last - first, dtype=torch.float64, device=chunk.device)
                total[start - first : stop - first].add_(chunk.to(total.device), alpha=task.weight)
        assert total is not None, "Empty tensors are no matrices."
        return total.view(-1, width)


MatrixRule = Callable[[TaskMatrices], Tensor]


def merge_matrices(
    tasks: Sequence[Task],
    rule: MatrixRule,
    non_matrix: Sequence[str] = NON_MATRIX,
    fuse_qkv: bool | None = None,
    flatten_conv: bool = False,
    others: str = "mean",
) -> dict[str, Tensor]:
    """
    Applies a rule to the matrices of a model and takes the mean, or the sum, of everything else.

    Args:
        tasks (`Sequence[Task]`):
            T tasks in canonical order.
        rule (`Callable`):
            Maps the [`TaskMatrices`] of one weight to a merged matrix of its `dtype`.
        non_matrix (`Sequence[str]`, *optional*):
            Name patterns of tensors that count among the others in any case.
        fuse_qkv (`bool`, *optional*):
            `True` stacks separate query, key and value weights of equal input dimension, `False` cuts fused ones.
        flatten_conv (`bool`, *optional*, defaults to `False`):
            Whether 4-D kernels count as matrices `(out, in * height * width)`.
        others (`str`, *optional*, defaults to `"mean"`):
            Linear method for everything else: `"mean"`, or `"task_arithmetic"` for the sum.

    Returns:
        `dict[str, Tensor]`: merged tensors, keys sorted, in the types of the tasks.

    Raises:
        `ValueError`: if the weights sum to zero and some tensor takes the mean.
    """
    merged: dict[str, Tensor] = {}
    for group in qkv_groups(sorted_keys(tasks), fuse_qkv):
        shapes = {key: tasks[0].shape(key) for key in group}
        matrices = [
            key for key in group if prod(shapes[key]) and is_matrix(key, len(shapes[key]), non_matrix, flatten_conv)
        ]
        for parts in _layout(matrices, shapes, fuse_qkv):
            _scatter(rule(TaskMatrices(tasks, parts)), parts, shapes, merged)
        for key in group:
            if key not in merged:
                coefficients = linear_coefficients(others, [task.weight for task in tasks])
                merged[key] = plain_sum(tasks, key, coefficients)
    return {key: merged[key] for key in sorted(merged)}


def is_matrix(key: str, dimensions: int, non_matrix: Sequence[str] = NON_MATRIX, flatten_conv: bool = False) -> bool:
    """Whether a tensor of so many dimensions is multiplied as a matrix: neither a table nor a vector."""
    is_table = any(fnmatchcase(key, pattern) for pattern in non_matrix)
    return not is_table and (dimensions == 2 or (dimensions == 4 and flatten_conv))


def whole(key: str, shape: Sequence[int]) -> Part:
    """The part that is all of a tensor."""
    return Part(key, 0, shape[0])


def _layout(keys: Sequence[str], shapes: dict[str, torch.Size], fuse_qkv: bool | None) -> list[list[Part]]:
    """The matrices that a group of tensors makes up."""
    if not keys:
        return []
    if len(keys) > 1 and len({shapes[key][1:] for key in keys}) == 1:
        return [[whole(key, shapes[key]) for key in keys]]
    layout = []
    for key in keys:
        dim = split_dimension(key, shapes[key]) if fuse_qkv is False else None
        count, size = (1, shapes[key][0]) if dim is None else (3, shapes[key][dim] // 3)
        layout += [[Part(key, index * size, (index + 1) * size, dim or 0)] for index in range(count)]
    return layout


def _scatter(matrix: Tensor, parts: Sequence[Part], shapes: dict[str, torch.Size], merged: dict[str, Tensor]) -> None:
    """Puts a merged matrix back into the tensors it was taken from."""
    row = 0
    for part in parts:
        shape = shapes[part.key]
        rows = part.stop - part.start if part.dim == 0 else matrix.shape[0]
        piece = matrix[row : row + rows]
        row += rows
        if piece.numel() == prod(shape):
            merged[part.key] = piece.reshape(shape).contiguous()
        else:
            whole = merged.setdefault(part.key, matrix.new_empty(shape))
            part.of(whole).copy_(piece)
