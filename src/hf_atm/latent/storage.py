"""Spaces on disk: one safetensors file, ids of text included."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


_KIND = "hf_atm.latent"


def write_tensors(path: str | os.PathLike, kind: str, fields: Mapping[str, Any]) -> None:
    """
    Write fields of a space beside `path` and rename.

    Args:
        path (`str` or `os.PathLike`):
            The file; its folder is made if need be.
        kind (`str`):
            Which class the fields belong to.
        fields (`Mapping[str, Any]`):
            Tensors, arrays of whole numbers or text, or whatever JSON can hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "U":
            encoded = [text.encode("utf-8") for text in value]
            tensors[f"{name}.text"] = torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy())
            tensors[f"{name}.ends"] = torch.from_numpy(np.cumsum([len(text) for text in encoded], dtype=np.int64))
        elif isinstance(value, np.ndarray):
            tensors[f"{name}.numbers"] = torch.from_numpy(np.ascontiguousarray(value))
        elif isinstance(value, Tensor):
            # A copy where a row's storage is shared with others, which safetensors refuses.
            tensors[name] = value.contiguous().clone() if value._base is not None else value.contiguous()
        else:
            plain[name] = value
    beside = path.with_name(f"{path.name}.tmp")
    # One entry: safetensors writes several in another order in every process.
    save_file(tensors, beside, metadata={_KIND: json.dumps({"kind": kind, "fields": plain})})
    os.replace(beside, path)


def read_tensors(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Counterpart of [`write_tensors`]; errors if the file holds another kind."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)!r} does not exist; save a space there first.")
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is no safetensors file: {error}") from error
    header = json.loads(metadata.get(_KIND, "{}"))
    found = header.get("kind")
    if found != kind:
        raise ValueError(f"{os.fspath(path)!r} holds {found or 'no latent space'}, not {kind}.")
    fields: dict[str, Any] = header["fields"]
    for name, tensor in tensors.items():
        field, _, form = name.partition(".")
        if form == "text":
            ends = tensors[f"{field}.ends"].tolist()
            text = tensor.numpy().tobytes()
            starts = [0, *ends[:-1]]
            fields[field] = np.array([text[a:b].decode("utf-8") for a, b in zip(starts, ends, strict=True)], np.str_)
        elif form == "numbers":
            fields[field] = tensor.numpy()
        elif not form:
            fields[field] = tensor
    return fields
