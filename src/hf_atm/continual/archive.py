"""Task vectors of earlier tasks, compressed and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..merging import compress_task_vector, decompress, merge_task_vectors


class TaskVectorArchive:
    """One file per task in a folder, each the leading singular triplets of its matrices.

    Args:
        folder (`Path`): created when the first task vector is stored.
        ratio (`float`, *optional*): share of a matrix's entries to keep, in (0, 1); `None` stores them whole.
    """

    def __init__(self, folder: Path, ratio: float | None = 0.1) -> None:
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"compression is {ratio}; it must lie in (0, 1), or be null to store task vectors whole.")
        self.folder = folder
        self.ratio = ratio

    def path(self, task: str) -> Path:
        """Where a task's vector lies."""
        return self.folder / f"{task}.safetensors"

    def store(self, task: str, vector: Mapping[str, Tensor]) -> int:
        """Compress and write a task vector; returns its size on disk in bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        dense = {name: vector[name] for name in vector}
        if self.ratio is None:
            stored = {f"dense/{name}": tensor.contiguous() for name, tensor in dense.items()}
        else:
            stored = compress_task_vector(dense, ratio=self.ratio)
        beside = self.path(task).with_suffix(".tmp")
        save_file(stored, beside)
        beside.replace(self.path(task))
        return self.path(task).stat().st_size

    def load(self, task: str) -> dict[str, Tensor]:
        """A task vector by parameter name."""
        stored = load_file(self.path(task))
        if any(name.startswith("dense/") for name in stored):
            return {name.removeprefix("dense/"): tensor for name, tensor in stored.items()}
        return decompress(stored)

    def merge(self, tasks: Sequence[str], method: str = "opcm", **kwargs: Any) -> dict[str, Tensor]:
        """The merge of stored task vectors, in the order in which the tasks arrived."""
        return merge_task_vectors([self.load(task) for task in tasks], method=method, names=list(tasks), **kwargs)
