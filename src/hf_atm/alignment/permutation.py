"""Orders of all units of a network, and state dicts written in another order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..merging.tying import alias_of
from ..seeding import derive_seed
from .spec import Flat, PermutationSpec


@dataclass(frozen=True)
class Permutation:
    """
    One admissible order of the units of every group.

    Vector c stands for the matrix P with `P[i, c[i]] = 1`: unit i of the result is unit `c[i]` of the source.

    Args:
        spec ([`PermutationSpec`]): the groups.
        vectors (`Mapping[str, np.ndarray]`): index vectors by name, those of `spec.variables`. Heads have two, over all
            their units: `group:qk` and `group:v`.
    """

    spec: PermutationSpec
    vectors: Mapping[str, np.ndarray]

    @classmethod
    def identity(cls, spec: PermutationSpec) -> Permutation:
        """Every unit in its place."""
        return cls(spec, {name: np.arange(size) for name, size in spec.variables.items()})

    @classmethod
    def random(cls, spec: PermutationSpec, seed: int = 0) -> Permutation:
        """A random admissible order; that of a group depends on the seed and the group's name alone."""
        vectors = {}
        for name, group in sorted(spec.groups.items()):
            draw = np.random.default_rng(derive_seed("permutation", seed, name))
            if isinstance(group, Flat):
                vectors[name] = draw.permutation(group.size)
                continue
            outer = draw.permutation(group.kv)
            for kind, free in (("qk", group.qk_inner), ("v", group.v_inner)):
                inner = [draw.permutation(group.dim) if free else np.arange(group.dim) for _ in range(group.kv)]
                vectors[f"{name}:{kind}"] = (outer[:, None] * group.dim + np.stack(inner)).reshape(-1)
        return cls(spec, vectors)

    def inverse(self) -> Permutation:
        """The order that undoes this one."""
        return Permutation(self.spec, {name: np.argsort(vector) for name, vector in self.vectors.items()})

    def compose(self, first: Permutation) -> Permutation:
        """The order that `first` and then this one give: `compose(first).apply(x)` is `apply(first.apply(x))`."""
        return Permutation(self.spec, {name: first.vectors[name][vector] for name, vector in self.vectors.items()})

    @property
    def is_identity(self) -> bool:
        """Whether every unit stays in its place."""
        return all(np.array_equal(vector, np.arange(len(vector))) for vector in self.vectors.values())

    @property
    def moved(self) -> int:
        """Number of units that do not stay in their place."""
        return sum(int((vector != np.arange(len(vector))).sum()) for vector in self.vectors.values())

    def apply(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """
        A state dict with its units in this order.

        The map is linear, so it holds for weights, task vectors, optimizer moments and LoRA factors alike.

        Args:
            state_dict (`Mapping[str, Tensor]`): any tensors under the names of the model's; not changed.

        Returns:
            `dict[str, Tensor]`: new tensors, same keys, shapes and types. Tied tensors stay tied; integers and
            whatever is not a tensor are copied as they are.

        Raises:
            `ValueError`: for a tensor that the specification does not cover or whose shape does not fit it.
        """
        done: dict[Any, Tensor] = {}
        result: dict[str, Any] = {}
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                result[name] = value
                continue
            key = alias_of(value) or name
            if key not in done:
                done[key] = self._order(name, value)
            result[name] = done[key]
        return result

    def _order(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        self.spec.check_shape(name, tensor.shape)
        result = tensor.detach()
        for dim, axis in enumerate(self.spec.axes_of(name, tensor.ndim)):
            offset, indices = 0, []
            for view in self.spec.views(axis):
                indices.append(view.indices(self.vectors[view.variable]) + offset)
                offset += view.size
            if indices:
                order = torch.from_numpy(np.concatenate(indices)).to(result.device)
                result = result.index_select(dim, order)
        return result.clone() if result.data_ptr() == tensor.data_ptr() else result
