"""The merged update of every module, by whichever arithmetic the method needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import Tensor

from ..registry import get_merge_method
from ..task_vectors import merge_task_vectors, norm_scale
from .factors import Dense, LowRank, Update, stacked, zero_update
from .modules import Layout, weight_name
from .reading import Adapter
from .spaces import CoreSpace, KnotsSpace, core_space, knots_space


SPACES = ("core", "full", "knots")


class DenseUpdates(Mapping[str, Tensor]):
    """The updates of one adapter multiplied out, by weight name in the layout of the weight; the last one is kept."""

    def __init__(self, adapter: Adapter, layouts: Mapping[str, Layout], dtype: torch.dtype) -> None:
        self.adapter, self.layouts, self.dtype = adapter, layouts, dtype
        self.modules = {weight_name(module): module for module in layouts}
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        last = self._last
        if last is None or last[0] != key:
            module = self.modules[key]
            dense = update_of(self.adapter, module, self.layouts).dense()
            self._last = last = key, self.layouts[module].weight(dense).to(self.dtype)
        return last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def update_of(adapter: Adapter, module: str, layouts: Mapping[str, Layout]) -> LowRank:
    """The exact update of a module in one adapter; zero where the adapter lacks the module."""
    found = adapter.modules.get(module)
    return zero_update(layouts[module].shape) if found is None else found.update


def check_space(method: str, space: str, kwargs: Mapping[str, Any]) -> None:
    """
    Refuses spaces in which a method, or one of its options, has no meaning.

    Raises:
        ValueError: naming method, space and the way out.
    """
    if space not in SPACES:
        raise ValueError(f"space={space!r} is unknown; choose one of {', '.join(map(repr, SPACES))}.")
    rule = get_merge_method(method)
    if space == "knots" and rule.family != "elementwise":
        raise ValueError(
            f"space='knots' is for elementwise methods such as 'ties' and 'dare', and {method!r} is {rule.family}; leave "
            "it at 'core'."
        )
    if space == "full" or rule.family == "linear":
        return
    if "statistics" in rule.parameters:
        raise ValueError(
            f"The statistics of {method!r} are of whole weights, not of space={space!r}; pass space='full'."
        )
    if kwargs.get("fuse_qkv") is not None:
        raise ValueError(
            f"fuse_qkv={kwargs['fuse_qkv']!r} cuts whole weights, not space={space!r}; pass space='full'."
        )


@dataclass(frozen=True)
class Merge:
    """What [`merged_updates`] was asked for, and who takes part.

    Args:
        adapters (`Sequence[Adapter]`): T adapters in the order given, to which keywords such as statistics refer.
        weights (`Sequence[float]`): T weights.
        layouts (`Mapping[str, Layout]`): all adapted modules.
        method, space, kwargs: as in [`merge_adapters`], checked.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    layouts: Mapping[str, Layout]
    method: str
    space: str
    kwargs: Mapping[str, Any]

    @property
    def counted(self) -> list[int]:
        """Indices of the tasks that take part, in canonical order; as in every method, not those of weight zero."""
        order = sorted(range(len(self.adapters)), key=lambda index: self.adapters[index].name)
        return [index for index in order if self.weights[index] != 0] or order

    def updates(self, module: str) -> list[LowRank]:
        """A module's updates in the tasks that take part."""
        return [update_of(self.adapters[index], module, self.layouts) for index in self.counted]

    def run(self, vectors: Sequence[Mapping[str, Tensor]], **defaults: Any) -> dict[str, Tensor]:
        """The method on T task vectors in the order given; defaults count for parameters that it has."""
        known = get_merge_method(self.method).parameters
        kwargs = {**{key: value for key, value in defaults.items() if key in known}, **self.kwargs}
        names = [adapter.name for adapter in self.adapters]
        return merge_task_vectors(vectors, self.method, self.weights, names, **kwargs)


def merged_updates(merge: Merge, scale: float | str, dtype: torch.dtype) -> tuple[dict[str, Update], float]:
    """
    Merges the updates of T adapters.

    Args:
        merge (`Merge`): what to merge and how.
        scale (`float` or `str`): lambda, or `"norm"`.
        dtype (`torch.dtype`): type of dense updates, in `"full"` space.

    Returns:
        `tuple[dict[str, Update], float]`: by module, scaled; and the scale as a number.
    """
    if get_merge_method(merge.method).family == "linear":
        merged = _merge_linear(merge)
    elif merge.space == "full":
        merged = _merge_dense(merge, dtype)
    else:
        merged = _merge_in_space(merge)
    if isinstance(scale, str):
        tasks = [merge.adapters[index] for index in merge.counted]
        norms = [_norm(update_of(task, module, merge.layouts) for module in merge.layouts) for task in tasks]
        scale = norm_scale(norms, _norm(merged.values()))
    return {module: update.scaled(scale) for module, update in merged.items()}, float(scale)


def _merge_linear(merge: Merge) -> dict[str, Update]:
    # A linear rule is its coefficients, and one-hot vectors show them.
    one_hot = torch.eye(len(merge.adapters), dtype=torch.float64)
    coefficients = merge.run([{weight_name(module): row for module in merge.layouts} for row in one_hot])
    merged: dict[str, Update] = {}
    for module, layout in merge.layouts.items():
        factors = coefficients[weight_name(module)].tolist()
        used = [index for index in merge.counted if factors[index] and module in merge.adapters[index].modules]
        terms = [merge.adapters[index].modules[module].update for index in used]
        merged[module] = stacked(terms, [factors[index] for index in used]) if used else zero_update(layout.shape)
    return merged


def _merge_dense(merge: Merge, dtype: torch.dtype) -> dict[str, Update]:
    layouts = merge.layouts
    flipped = [escape(weight_name(module)) for module in layouts if layouts[module].transposed]
    dense = merge.run([DenseUpdates(adapter, layouts, dtype) for adapter in merge.adapters], transposed=flipped)
    return {module: Dense(layouts[module].matrix(dense[weight_name(module)])) for module in layouts}


def _merge_in_space(merge: Merge) -> dict[str, Update]:
    family = get_merge_method(merge.method).family
    spaces: dict[str, CoreSpace | KnotsSpace] = {}
    for module in merge.layouts:
        updates = merge.updates(module)
        found = (
            knots_space(updates)
            if merge.space == "knots"
            else core_space(updates, pad=family == "spectral", any_basis=family != "elementwise")
        )
        if found.parts[0].numel():
            spaces[module] = found
    vectors: list[dict[str, Tensor]] = [{} for _ in merge.adapters]
    for module, space in spaces.items():
        for vector in vectors:
            vector[weight_name(module)] = torch.zeros_like(space.parts[0])
        for index, part in zip(merge.counted, space.parts, strict=True):
            vectors[index][weight_name(module)] = part
    # The threshold spares biases and norms; here there are only matrices, small because their space is.
    parts = merge.run(vectors, min_sparse_numel=0, transposed=()) if spaces else {}
    return {
        module: spaces[module].lift(parts[weight_name(module)]) if module in spaces else zero_update(layout.shape)
        for module, layout in merge.layouts.items()
    }


def mean_shares(weights: Sequence[float]) -> list[float]:
    """Shares that follow the absolute weights and add up to one."""
    total = math.fsum(abs(weight) for weight in weights)
    return [abs(weight) / total if total else 1 / len(weights) for weight in weights]


def mean_factors(updates: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    """Left and right factors averaged each on its own, those of lower rank filled up with zeros."""
    rank = max(update.rank for update in updates)
    m, n = updates[0].shape
    left, right = torch.zeros(m, rank, dtype=torch.float64), torch.zeros(rank, n, dtype=torch.float64)
    for update, share in zip(updates, shares, strict=True):
        left[:, : update.rank] += share * update.left
        right[: update.rank] += share * update.right
    return LowRank(left, right)


def _norm(updates: Iterable[Update]) -> float:
    return math.sqrt(math.fsum(update.norm() ** 2 for update in updates))
