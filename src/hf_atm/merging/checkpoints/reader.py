"""Checkpoints on disk as mappings of tensors: safetensors only, one file or many, nothing read before it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")

# What a merge needs of a repository on the Hub; weights in other formats stay there.
_HUB_PATTERNS = tuple("*.safetensors *.json *.txt *.model *.jinja *.spm *.tiktoken *.vocab *.bpe *.py".split())


def resolve_model(reference: str, revision: str | None = None) -> Path:
    """
    The folder (or single file) of a model.

    Args:
        reference (`str`): a folder, a `.safetensors` file, or a Hub id such as `"org/name"`, then fetched or taken from
            the cache.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        `FileNotFoundError`: if it is neither a path nor something the Hub (or, offline, the cache) has.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise FileNotFoundError(f"Model {reference!r} is neither a folder nor a Hub id such as 'org/name'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"Model {reference!r} is not a folder here and could not be fetched from the Hub ({reason})."
        ) from error


class CheckpointReader(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, memory-mapped: reading one touches its own pages only.

    Args:
        path (`Path`): a folder with `model.safetensors`, its index, or one other `.safetensors` file; or such a file.

    Raises:
        `FileNotFoundError`: when there is no safetensors file, or the index names one that is missing.
        `ValueError`: when a file is truncated or corrupt, holds a name twice, or lacks tensors that the index lists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _weight_files(path)
        self._handles: dict[str, Any] = {}
        self._spans: dict[str, tuple[str, int, int]] = {}
        for file in self.files:
            handle = _open(file)
            spans = _spans(file)
            for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if key in self._handles:
                    raise ValueError(f"Tensor '{key}' is in two files of {path}; write the checkpoint again.")
                self._handles[key] = handle
                self._spans[key] = (str(file), *spans[key])
        self._check_index()
        if not self._handles:
            raise ValueError(f"{path} holds no tensors.")
        self._advised: dict[str, int] = {}
        self._views: dict[str, Tensor] = {}

    def _check_index(self) -> None:
        index = self.path / INDEX_NAME
        if self.path.is_dir() and self.files[0].name != WEIGHTS_NAME and index.is_file():
            promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted(set(promised) - set(self._handles))
            if missing:
                raise ValueError(
                    f"{index} lists tensors that its files do not hold, such as '{missing[0]}'; fetch or write the "
                    "checkpoint again."
                )

    def __getitem__(self, key: str) -> Tensor:
        # A view of mapped memory costs nothing to keep, and a while to make.
        tensor = self._views.get(key)
        if tensor is None:
            tensor = self._views[key] = self._handles[key].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, key: object) -> bool:
        return key in self._handles

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor in its file."""
        _, start, stop = self._spans[key]
        return stop - start

    def prefetch(self, keys: Iterable[str]) -> None:
        """Asks the operating system to read the tensors while something else is computed; a hint, where it is known."""
        if not hasattr(os, "posix_fadvise"):
            return
        for key in keys:
            if key in self._spans:
                file, start, stop = self._spans[key]
                if file not in self._advised:
                    self._advised[file] = os.open(file, os.O_RDONLY)
                os.posix_fadvise(self._advised[file], start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes what `prefetch` opened."""
        for descriptor in self._advised.values():
            os.close(descriptor)
        self._advised.clear()

    def identity(self) -> list[list[Any]]:
        """Name, size and time of every file: enough to see that none changed between two runs."""
        return [identify(file) for file in self.files]


def identify(file: Path) -> list[Any]:
    """Name, size and time of a file."""
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return path.is_dir() and (path / ADAPTER_NAME).is_file()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a safetensors file; {_convert()}.")
        return [path]
    index = path / INDEX_NAME
    # With both, transformers reads the single file.
    if index.is_file() and not (path / WEIGHTS_NAME).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error}.") from error
        # A name with a folder in it could lead out of the checkpoint.
        missing = [name for name in names if os.path.basename(name) != name or not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} lacks {missing[0]!r}, which its index lists; fetch the checkpoint again.")
        return [path / name for name in names]
    if (path / WEIGHTS_NAME).is_file():
        return [path / WEIGHTS_NAME]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ValueError(
            f"{path} holds {len(found)} safetensors files and neither {WEIGHTS_NAME} nor {INDEX_NAME}; name one file."
        )
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(f"{path} holds its weights as {pickles[0]!r}, which is never read; {_convert()}.")
    raise FileNotFoundError(f"{path} holds no safetensors file.")


def _convert() -> str:
    return "pickles can run code; load the model once where you trust it and call save_pretrained, which writes safetensors"


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}); fetch or write it again.") from error


def _spans(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in the file, from its header."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    offset = 8 + length
    return {
        key: (offset + entry["data_offsets"][0], offset + entry["data_offsets"][1])
        for key, entry in header.items()
        if key != "__metadata__"
    }
