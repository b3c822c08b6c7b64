"""Which tensor axes a group of interchangeable units orders: the data model of alignment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..merging.plan import matches


@dataclass(frozen=True)
class Flat:
    """
    Units that may stand in any order, such as the neurons of a hidden layer.

    Args:
        size (`int`): number of units.
    """

    size: int


@dataclass(frozen=True)
class Heads:
    """
    Attention heads: the key-value heads may change places, and the units inside a head may, as one order of queries
    and keys and one of values and outputs. The query heads of one key-value head stay together in their order.

    Args:
        kv (`int`): number of key-value heads.
        per_kv (`int`, *optional*, defaults to 1): query heads per key-value head.
        dim (`int`, *optional*, defaults to 1): units of a head.
        qk_inner (`bool`, *optional*, defaults to `True`): whether units of queries and keys may change places;
            `False` with rotary positions, which tie a frequency to each.
        v_inner (`bool`, *optional*, defaults to `True`): whether units of values may.
    """

    kv: int
    per_kv: int = 1
    dim: int = 1
    qk_inner: bool = True
    v_inner: bool = True


Group = Flat | Heads

# One entry per dimension: None for an order that is fixed, a group, or the groups of a fused axis one after the other.
Axis = str | None | Sequence[str]


@dataclass(frozen=True)
class View:
    """
    How one index vector orders an axis of `outer * expand * inner` entries: entry `(a, e, b)` moves with unit `(a, b)`.

    Args:
        variable (`str`): the index vector: a flat group, or `group:qk` or `group:v` of heads.
        outer, expand, inner (`int`): factors of the axis; the vector has `outer * inner` entries.
    """

    variable: str
    outer: int
    expand: int
    inner: int

    @property
    def size(self) -> int:
        """Entries of the axis."""
        return self.outer * self.expand * self.inner

    def indices(self, vector: np.ndarray) -> np.ndarray:
        """The index vector of the whole axis, shape `(size,)`."""
        outer, inner = np.divmod(np.asarray(vector).reshape(self.outer, 1, self.inner), self.inner)
        return ((outer * self.expand + np.arange(self.expand)[None, :, None]) * self.inner + inner).reshape(-1)


# PEFT's names: the adapted weight, the factor's kind, the adapter.
_LORA = re.compile(r"(.*)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.[^.]+)*?(\.weight)?")


@dataclass(frozen=True)
class PermutationSpec:
    """
    A network's permutation symmetries: groups of units, and the group that orders each axis of each tensor.

    An axis is written `"M.3"` (a group), `"A.3:q"` (queries of heads; also `k`, `v`, and `o` for the input of the output
    projection), `"C.13*49"` (every unit covers 49 neighbouring entries, as channels do after flattening), a list of
    these for a fused axis, or `None` for an order that must stay. A pattern stands for the names that end in it, from
    a dot on, and may hold the wildcards of `fnmatch`.

    Args:
        groups (`Mapping[str, Flat | Heads]`): groups by name.
        axes (`Mapping[str, tuple]`): one axis per dimension by pattern of tensor names; at most two of them permuted.
        heads (`Sequence[str]`, *optional*): patterns of tensors that are mapped but not matched: task heads, whose
            outputs differ between models. They may be missing in some models and differ in unpermuted sizes.
        optional (`Sequence[str]`, *optional*): keys of `axes` that a model may lack.
        transposed (`Sequence[str]`, *optional*): patterns of two-dimensional weights stored as (inputs, outputs).

    Raises:
        `ValueError`: for axes that name no group or a view it lacks, or more than two permuted axes.

    Example:

    ```python
    >>> from hf_atm.alignment import Flat, PermutationSpec

    >>> spec = PermutationSpec({"P": Flat(8)}, {"0.weight": ("P", None), "0.bias": ("P",), "2.*": (None, "P")})
    >>> spec.axes_of("0.weight")
    ('P', None)
    ```
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    heads: Sequence[str] = ()
    optional: Sequence[str] = ()
    transposed: Sequence[str] = ()
    _found: dict[str, tuple[Axis, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("heads", "optional", "transposed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for pattern, axes in self.axes.items():
            permuted = [axis for axis in axes if axis is not None]
            if len(permuted) > 2:
                raise ValueError(
                    f"Pattern '{pattern}' has {len(permuted)} permuted axes; at most two can be matched, write the "
                    "others as None."
                )
            for axis in permuted:
                self.views(axis, pattern)

    @cached_property
    def variables(self) -> dict[str, int]:
        """Sizes of the index vectors by name: one per flat group, `:qk` and `:v` per group of heads."""
        sizes: dict[str, int] = {}
        for name, group in sorted(self.groups.items()):
            if isinstance(group, Flat):
                sizes[name] = group.size
            else:
                sizes |= dict.fromkeys((f"{name}:qk", f"{name}:v"), group.kv * group.dim)
        return sizes

    def views(self, axis: Axis, where: str = "") -> list[View]:
        """The views along an axis, one after the other; empty for an axis that is not permuted."""
        if axis is None:
            return []
        return [self._view(part, where) for part in ([axis] if isinstance(axis, str) else axis)]

    def _view(self, text: str, where: str) -> View:
        body, _, expand = text.partition("*")
        name, colon, kind = body.partition(":")
        group = self.groups.get(name)
        if group is None:
            raise ValueError(
                f"Axis '{text}' of '{where}' names no group; known ones are {', '.join(sorted(self.groups))}."
            )
        if isinstance(group, Flat):
            if colon:
                raise ValueError(
                    f"Axis '{text}' of '{where}' has a view, but '{name}' is a flat group; write '{name}'."
                )
            return View(name, group.size, int(expand or 1), 1)
        if kind not in ("q", "k", "v", "o") or expand:
            raise ValueError(f"Axis '{text}' of '{where}' must be a view of heads: '{name}:' and one of q, k, v, o.")
        variable = f"{name}:{'qk' if kind in 'qk' else 'v'}"
        return View(variable, group.kv, group.per_kv if kind in "qo" else 1, group.dim)

    @cached_property
    def _globs(self) -> list[str]:
        return [pattern for pattern in self.axes if any(sign in pattern for sign in "*?[")]

    def patterns_of(self, name: str) -> list[str]:
        """The patterns that stand for a tensor's name; one is right. The longest ending goes before all others."""
        parts = name.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts)))
        found = next((ending for ending in endings if ending in self.axes), None)
        return [found] if found is not None else [glob for glob in self._globs if _ends_in(name, glob)]

    def axes_of(self, name: str, ndim: int | None = None) -> tuple[Axis, ...]:
        """
        The axes of a tensor: of a weight, of a task's own copy of one, or of a LoRA factor of one.

        Raises:
            `ValueError`: if no pattern or more than one stands for the name.
        """
        if ndim == 0:
            return ()
        if name not in self._found:
            self._found[name] = self._find(name, ndim)
        return self._found[name]

    def _find(self, name: str, ndim: int | None) -> tuple[Axis, ...]:
        # Multi-task models write the dots of private copies as slashes; PEFT moves a weight into a base_layer.
        plain = name.replace("/", ".").replace(".base_layer.", ".")
        if (factor := _LORA.fullmatch(plain)) is not None:
            return self._factor_axes(f"{factor[1]}.weight", factor[2], ndim)
        found = self.patterns_of(plain)
        if not found:
            raise ValueError(
                f"The specification says nothing about tensor '{name}'; add its axes to PermutationSpec.axes, None for "
                "those that stay."
            )
        if len(found) > 1:
            raise ValueError(f"Tensor '{name}' matches several patterns ({', '.join(found)}); keep one of them.")
        return tuple(self.axes[found[0]])

    def _factor_axes(self, weight: str, kind: str, ndim: int | None) -> tuple[Axis, ...]:
        axes = self._find(weight, None)
        rows, columns = axes[0], axes[1]
        if any(_ends_in(weight, pattern) for pattern in self.transposed) != kind.startswith("embedding"):
            rows, columns = columns, rows
        if kind == "magnitude_vector":
            return (rows,)
        pair: tuple[Axis, ...] = (None, columns) if kind.endswith("A") else (rows, None)
        return (*pair, *(None,) * ((ndim or 2) - 2))

    def is_head(self, name: str) -> bool:
        """Whether a tensor is mapped but not matched."""
        return any(_ends_in(name, pattern) for pattern in self.heads)

    def restricted(self, names: Sequence[str]) -> PermutationSpec:
        """The specification with only the groups that these tensors use, and no pattern beside theirs."""
        patterns = {pattern for name in names for pattern in self.patterns_of(name.replace("/", "."))}
        axes = {pattern: value for pattern, value in self.axes.items() if pattern in patterns}
        used = {
            view.variable.partition(":")[0] for value in axes.values() for axis in value for view in self.views(axis)
        }
        groups = {name: group for name, group in self.groups.items() if name in used}
        return replace(self, groups=groups, axes=axes, optional=[p for p in self.optional if p in patterns])

    def missing(self, names: Sequence[str]) -> list[str]:
        """Patterns that should stand for one of these names and do not."""
        used = {pattern for name in names for pattern in self.patterns_of(name.replace("/", "."))}
        return [pattern for pattern in self.axes if pattern not in used and pattern not in self.optional]

    def check_shape(self, name: str, shape: torch.Size) -> None:
        """Raises `ValueError` where a tensor's shape does not fit its axes."""
        axes = self.axes_of(name, len(shape))
        if len(axes) != len(shape):
            raise ValueError(
                f"Tensor '{name}' has {len(shape)} dimensions, its specification {len(axes)}; give one axis per dimension."
            )
        for index, axis in enumerate(axes):
            views = self.views(axis)
            size = sum(view.size for view in views)
            if views and size != shape[index]:
                raise ValueError(
                    f"Axis {index} of tensor '{name}' has {shape[index]} entries, but its group {axis!r} orders {size}; "
                    "correct the group's size or the axis."
                )

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON values."""
        return {
            "groups": {name: {"type": type(group).__name__, **vars(group)} for name, group in self.groups.items()},
            "axes": {pattern: list(axes) for pattern, axes in self.axes.items()},
            "heads": list(self.heads),
            "optional": list(self.optional),
            "transposed": list(self.transposed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PermutationSpec:
        """The specification that [`~PermutationSpec.to_dict`] wrote."""
        kinds: dict[str, type[Flat] | type[Heads]] = {"Flat": Flat, "Heads": Heads}
        groups: dict[str, Group] = {}
        for name, fields in values["groups"].items():
            rest = {key: value for key, value in fields.items() if key != "type"}
            groups[name] = kinds[fields["type"]](**rest)
        axes = {pattern: tuple(entries) for pattern, entries in values["axes"].items()}
        return cls(groups, axes, values["heads"], values["optional"], values["transposed"])


def _ends_in(name: str, pattern: str) -> bool:
    return matches(name, (pattern, f"*.{pattern}"))
