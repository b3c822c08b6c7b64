"""Names of samples: whole numbers or text, unique within a space, the same in every space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..merging.tensors import MAX_LISTED


def as_ids(values: Any, where: str = "ids") -> np.ndarray:
    """
    Ids as an array, `(N,)`, of int64 or of text.

    Raises:
        `ValueError`: when they are neither all whole numbers nor all text, or not in one row.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        values = list(values)
        # NumPy would turn 1 beside "a" into text, and True into 1.
        kinds = {"text" if isinstance(value, str) else type(value).__name__ for value in values}
        if "text" in kinds and len(kinds) > 1:
            raise ValueError(f"{where} mix text and {', '.join(sorted(kinds - {'text'}))}; use one kind.")
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{where} must be one row of whole numbers or of text, not of shape {array.shape}.")
    if array.dtype.kind in "iu" or not array.size:
        return array.astype(np.int64)
    if array.dtype.kind == "U" or (array.dtype.kind == "O" and all(isinstance(value, str) for value in array)):
        return array.astype(np.str_)
    raise ValueError(f"{where} must be whole numbers or text, not {array.dtype}.")


def repeated(ids: np.ndarray) -> np.ndarray:
    """The ids that occur more than once, sorted."""
    values, counts = np.unique(ids, return_counts=True)
    return values[counts > 1]


def positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` stands in `ids`, int64; -1 where it does not."""
    if not len(ids) or ids.dtype.kind != wanted.dtype.kind:
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids[order], wanted).clip(max=len(ids) - 1)
    found = order[places]
    return np.where(ids[found] == wanted, found, -1)


def named(ids: Sequence[Any] | np.ndarray) -> str:
    """Ids for a message, long lists shortened."""
    shown = ", ".join(repr(value.item() if hasattr(value, "item") else value) for value in ids[:MAX_LISTED])
    return shown if len(ids) <= MAX_LISTED else f"{shown} and {len(ids) - MAX_LISTED} more"
