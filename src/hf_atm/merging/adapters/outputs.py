"""What a merge is written as: concatenated or cut factors, dense updates, or factors with a dense rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .factors import LowRank, Update
from .modules import Layout, weight_name
from .reading import Adapter
from .updates import mean_factors, mean_shares, update_of


OUTPUTS = ("cat", "svd", "delta", "residual")


class Deltas(Mapping[str, Tensor]):
    """Dense updates by weight name, each multiplied out when it is read.

    Args:
        updates (`Mapping[str, Update]`): merged updates by module.
        layouts (`Mapping[str, Layout]`): of the weights.
        dtype (`torch.dtype`): of the tensors given out.
        minus (`Mapping[str, LowRank]`, *optional*): what an adapter already holds of each update.
    """

    def __init__(
        self,
        updates: Mapping[str, Update],
        layouts: Mapping[str, Layout],
        dtype: torch.dtype,
        minus: Mapping[str, LowRank] | None = None,
    ) -> None:
        self.updates, self.dtype, self.minus = updates, dtype, minus or {}
        self.layouts = {weight_name(module): layouts[module] for module in updates}

    def __getitem__(self, key: str) -> Tensor:
        layout = self.layouts[key]
        module = key.removesuffix(".weight")
        matrix = self.updates[module].dense()
        if module in self.minus:
            matrix = matrix - self.minus[module].dense()
        return layout.weight(matrix).to(self.dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __len__(self) -> int:
        return len(self.layouts)


@dataclass(frozen=True)
class Written:
    """The merged updates in the form asked for.

    Args:
        factors (`dict[str, LowRank]`): by module; empty for `"delta"`.
        deltas (`Mapping[str, Tensor]`): dense updates by weight name; empty for `"cat"` and `"svd"`.
        energies (`dict[str, tuple[float, float]]`): by module, the energy (squared norm) cut off and that before; empty
            where nothing is cut.
    """

    factors: dict[str, LowRank] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Ranks and lost energy, by module and over all."""
        modules = {
            module: {"rank": update.rank, "lost_energy": _share(*self.energies.get(module, (0.0, 0.0)))}
            for module, update in self.factors.items()
        }
        lost, total = (math.fsum(energy[side] for energy in self.energies.values()) for side in (0, 1))
        return {"lost_energy": _share(lost, total), "modules": modules}


def check_rank(svd_rank: Any, output: str) -> None:
    """
    Checks the output's name and the type of the rank.

    Raises:
        ValueError: for an unknown output, a rank that is no positive integer, or one that nothing would read.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is unknown; choose one of {', '.join(map(repr, OUTPUTS))}.")
    if svd_rank is None:
        return
    if output != "svd":
        raise ValueError(f"svd_rank={svd_rank!r} is only for output='svd', got output={output!r}.")
    if isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1:
        raise ValueError(f"svd_rank={svd_rank!r} must be a positive integer.")


def write_updates(
    output: str,
    svd_rank: int | None,
    merged: Mapping[str, Update],
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    layouts: Mapping[str, Layout],
    dtype: torch.dtype,
) -> Written:
    """
    Brings merged updates into the form of an output, see [`merge_adapters`].

    Raises:
        ValueError: if `svd_rank` exceeds the exact rank of every module.
    """
    if output == "delta":
        return Written(deltas=Deltas(merged, layouts, dtype))
    if output == "residual":
        shares = mean_shares(weights)
        factors = {
            module: _rounded(
                mean_factors([update_of(adapter, module, layouts) for adapter in adapters], shares), dtype
            )
            for module in merged
        }
        return Written(factors, Deltas(merged, layouts, dtype, minus=factors))
    if output == "cat":
        exact = {
            module: update if isinstance(update, LowRank) else update.cut()[0] for module, update in merged.items()
        }
        return Written(exact)
    limits = {module: min(update.rank, *update.shape) for module, update in merged.items()}
    if svd_rank is not None and svd_rank > max(limits.values()):
        raise ValueError(
            f"svd_rank={svd_rank} exceeds the exact rank of this merge, which is {max(limits.values())}; lower it, or "
            "pass output='cat', which loses nothing."
        )
    factors, energies = {}, {}
    for module, update in merged.items():
        usual = max(adapter.modules[module].rank for adapter in adapters if module in adapter.modules)
        rank = min(svd_rank or usual, limits[module])
        factors[module], values = update.cut(rank)
        energies[module] = float(values[rank:].square().sum()), float(values.square().sum())
    return Written(factors, {}, energies)


def _rounded(factors: LowRank, dtype: torch.dtype) -> LowRank:
    """Factors as they will be stored, so that what is left over is exact."""
    return LowRank(factors.left.to(dtype).double(), factors.right.to(dtype).double())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
