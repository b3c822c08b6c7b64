"""Where every tensor of a checkpoint will lie on disk, known before the first one is computed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .reader import INDEX_NAME, WEIGHTS_NAME


# Names of the safetensors format.
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


_POSITION = threading.Lock()


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go: file name, first byte, number of bytes."""

    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint.

    Args:
        tensors (`dict[str, Tensor]`): name, type and shape of each tensor, as tensors without memory (`meta`).
        files (`dict[str, list[str]]`): the tensors of each file, in the order of their bytes.
        headers (`dict[str, bytes]`): what each file begins with.
        places (`dict[str, Place]`): where each tensor goes.
        index (`str`): text of the index, empty for a single file.
    """

    tensors: dict[str, Tensor]
    files: dict[str, list[str]]
    headers: dict[str, bytes]
    places: dict[str, Place]
    index: str

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.headers.values())) + sum(place.nbytes for place in self.places.values())

    def create(self, folder: Path) -> None:
        """Writes headers and index; every file gets its final size, so that tensors can be written in any order."""
        for file, keys in self.files.items():
            size = len(self.headers[file]) + sum(self.places[key].nbytes for key in keys)
            with open(folder / file, "wb") as handle:
                handle.write(self.headers[file])
                handle.truncate(size)
        if self.index:
            (folder / INDEX_NAME).write_text(self.index, encoding="utf-8")


def plan_layout(tensors: dict[str, Tensor], max_shard_size: int | str, name: str = WEIGHTS_NAME) -> Layout:
    """
    Shares tensors out over files.

    Args:
        tensors (`dict[str, Tensor]`): tensors on the `meta` device, in the order in which they are to be stored.
        max_shard_size (`int` or `str`): largest file, in bytes or as in `"5GB"`; a larger tensor gets its own file.
        name (`str`, *optional*, defaults to `"model.safetensors"`): the single file's name; shards are numbered.

    Raises:
        `ValueError`: for a size that cannot be read, or a type the format does not have.
    """
    # Its sibling for torch tensors would import a third of torch to look at them.
    from huggingface_hub import split_state_dict_into_shards_factory

    if isinstance(max_shard_size, str) and max_shard_size.isdigit():
        max_shard_size = int(max_shard_size)
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} must be above 0, or a size such as '5GB'.")
    pattern = name.removesuffix(".safetensors") + "{suffix}.safetensors"
    try:
        split = split_state_dict_into_shards_factory(
            tensors, get_storage_size=_nbytes, filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(
            f"max_shard_size={max_shard_size!r} is not a size such as '5GB' ({str(error).rstrip('.')})."
        ) from error
    headers: dict[str, bytes] = {}
    places: dict[str, Place] = {}
    files = {file: _by_alignment(keys, tensors) for file, keys in split.filename_to_tensors.items()}
    for file, keys in files.items():
        headers[file], starts = _header(keys, tensors)
        places |= {key: Place(file, start, _nbytes(tensors[key])) for key, start in zip(keys, starts, strict=True)}
    index = ""
    if split.is_sharded:
        weight_map = {key: places[key].file for key in sorted(places)}
        index = json.dumps({"metadata": split.metadata, "weight_map": weight_map}, indent=2) + "\n"
    return Layout(tensors, files, headers, places, index)


def write_at(descriptor: int, tensor: Tensor, start: int) -> memoryview:
    """Writes a contiguous CPU tensor's bytes at a position of an open file; returns the bytes."""
    data = bytes_of(tensor)
    written = 0
    while written < len(data):
        written += _write(descriptor, data[written:], start + written)
    return data


def _write(descriptor: int, data: memoryview, start: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, start)
    # Windows can only move a file's one position.
    with _POSITION:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.write(descriptor, data)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    # NumPy has no bfloat16; bytes are bytes.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def meta_tensors(entries: Iterable[tuple[str, torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Names, shapes and types as tensors without memory."""
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape, dtype in entries}


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _by_alignment(keys: Iterable[str], tensors: dict[str, Tensor]) -> list[str]:
    # Wide types first, as the reference implementation stores them: every tensor then starts at a multiple of its type.
    return sorted(keys, key=lambda key: -tensors[key].itemsize)


def _header(keys: Iterable[str], tensors: dict[str, Tensor]) -> tuple[bytes, list[int]]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for key in keys:
        tensor = tensors[key]
        if tensor.dtype not in _TYPE_NAMES:
            raise ValueError(f"Tensor '{key}' is {tensor.dtype}, which a safetensors file cannot hold.")
        starts.append(end)
        end += _nbytes(tensor)
        entries[key] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]
