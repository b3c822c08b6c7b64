"""Queries, keys and values of attention: which tensors hold them, together or apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


# What models call the three projections; the name must be a whole component, such as in `layers.0.self_attn.q_proj`.
_APART = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)

# One tensor, the three projections one after the other: dimension along which they lie. `query_key_value` is missing:
# GPT-NeoX, BLOOM and Falcon interleave it by attention head, so that its thirds are no projections.
_TOGETHER = {"c_attn": 1, "qkv_proj": 0, "in_proj_weight": 0, "qkv": 0, "Wqkv": 0}


def qkv_groups(keys: Sequence[str], fuse_qkv: bool | None = None, **_kwargs: Any) -> list[list[str]]:
    """
    Tensors that are merged as one matrix.

    Args:
        keys (`Sequence[str]`):
            Tensor names.
        fuse_qkv (`bool`, *optional*):
            `True` puts the weights of a block's query, key and value projections together, in this order.
        **_kwargs:
            Other keywords of a merge method, which change nothing.

    Returns:
        `list[list[str]]`: all names, sorted by the first of each group.

    Example:

    ```python
    >>> from hf_atm.merging.spectral.fused import qkv_groups

    >>> qkv_groups(["h.attn.k.weight", "h.attn.o.weight", "h.attn.q.weight", "h.attn.v.weight"], fuse_qkv=True)
    [['h.attn.o.weight'], ['h.attn.q.weight', 'h.attn.k.weight', 'h.attn.v.weight']]
    ```
    """
    if not fuse_qkv:
        return [[key] for key in sorted(keys)]
    blocks: dict[tuple[str, tuple[str, ...]], dict[str, str]] = defaultdict(dict)
    for key in sorted(keys):
        head, _, last = key.rpartition(".")
        prefix, _, name = head.rpartition(".")
        family = next((names for names in _APART if name in names), None)
        if last == "weight" and family is not None:
            blocks[prefix, family][name] = key
    whole = [[found[name] for name in family] for (_, family), found in blocks.items() if len(found) == len(family)]
    grouped = {key for group in whole for key in group}
    return sorted([*whole, *([key] for key in keys if key not in grouped)])


def split_dimension(key: str, shape: Sequence[int]) -> int | None:
    """
    Dimension along which a tensor falls into query, key and value, each as large as the input; `None` if it does not.

    With grouped queries the three differ in size, which names and shapes do not tell: such tensors stay whole.
    """
    components = key.split(".")
    name = components[-2] if components[-1] == "weight" and len(components) > 1 else components[-1]
    dimension = _TOGETHER.get(name)
    if dimension is None or len(shape) != 2 or shape[dimension] != 3 * shape[1 - dimension]:
        return None
    return dimension
