"""Axes of the parts that networks are made of."""

from __future__ import annotations

from collections.abc import Iterable

from ..spec import Axis


Axes = dict[str, tuple[Axis, ...]]


def linear(name: str, rows: Axis, columns: Axis) -> Axes:
    """A layer with weight (outputs, inputs) and bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def transposed(name: str, rows: Axis, columns: Axis) -> Axes:
    """A layer with weight (inputs, outputs) and bias."""
    return {f"{name}.weight": (columns, rows), f"{name}.bias": (rows,)}


def conv(name: str, rows: Axis, columns: Axis) -> Axes:
    """A two-dimensional convolution with bias."""
    return {f"{name}.weight": (rows, columns, None, None), f"{name}.bias": (rows,)}


def norm(name: str, group: Axis) -> Axes:
    """A normalisation over channels."""
    return {f"{name}.weight": (group,), f"{name}.bias": (group,)}


def batch_norm(name: str, group: Axis) -> Axes:
    """A batch normalisation, with its running statistics."""
    return {**norm(name, group), f"{name}.running_mean": (group,), f"{name}.running_var": (group,)}


def attention(names: Iterable[str], group: str, stream: str) -> Axes:
    """Projections to queries, keys and values, and from values to the stream, in this order."""
    q, k, v, out = names
    return {
        **linear(q, f"{group}:q", stream),
        **linear(k, f"{group}:k", stream),
        **linear(v, f"{group}:v", stream),
        **linear(out, stream, f"{group}:o"),
    }
