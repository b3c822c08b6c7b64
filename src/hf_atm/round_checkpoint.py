"""The part of a round that a checkpoint has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .spaces import Space


class RoundCheckpoint:
    """Saves and loads the state of a round; see [`RoundState`]."""

    space: Space
    outer: Any
    streaming: bool
    entrywise: bool
    statistics: dict[str, Tensor]
    origin: dict[str, Tensor]
    base: dict[str, Tensor]
    base_statistics: dict[str, Tensor]
    norms: dict[str, float]
    vectors: dict[str, Any]
    sum: dict[str, Tensor]
    weight_sum: dict[str, Tensor]
    entry_weights: dict[str, Mapping[str, Tensor]]
    sketches: dict[str, Tensor]
    task_statistics: dict[str, dict[str, Tensor]]
    heads: dict[str, dict[str, Tensor]]
    merged_vectors: dict[str, Any]
    expert_heads: dict[str, dict[str, Tensor]]
    weights: dict[str, float]
    mixing: Tensor | None
    scale: float
    step_size: float
    start: Any
    open: Callable[[], None]
    _weigh: Callable[[Mapping[str, float]], None]
    _read_statistics: Callable[[], dict[str, Tensor]]
    _write_statistics: Callable[[Mapping[str, Tensor]], None]

    def state(self, mid_round: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint must hold beside the Trainer's own: JSON-ready values, and tensors by dotted name."""
        tensors = {f"outer.velocity.{name}": tensor for name, tensor in self.outer.velocity.items()}
        tensors |= {f"origin.{name}": tensor for name, tensor in self.origin.items()}
        tensors |= {f"weights.{name}": tensor for name, tensor in self.space.checkpoint_weights().items()}
        # The Trainer's checkpoint of an adapter holds no buffers.
        tensors |= {f"statistics.{name}": tensor for name, tensor in self._read_statistics().items()}
        merge, kept = self._last_merge()
        tensors |= kept
        if not mid_round:
            return {"last_merge": merge}, tensors
        tensors |= {f"base.{name}": tensor for name, tensor in self.base.items()}
        tensors |= {f"base_statistics.{name}": tensor for name, tensor in self.base_statistics.items()}
        tensors |= {f"sum.{name}": tensor for name, tensor in self.sum.items()}
        tensors |= {f"weight_sum.{name}": tensor for name, tensor in self.weight_sum.items()}
        tensors |= {f"sketch.{task}": tensor for task, tensor in self.sketches.items()}
        for kind, by_task in (
            ("task_vectors", {task: vector.tensors for task, vector in self.vectors.items()}),
            ("task_statistics", self.task_statistics),
            ("entry_weights", self.entry_weights),
            ("heads", self.heads),
        ):
            tensors |= _named(kind, by_task)
        return {"norms": self.norms, "last_merge": merge}, tensors

    def _last_merge(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What experts of an adapter are written from, once they are merged. Whole weights are too large to hold here."""
        vectors = self.merged_vectors if self.space.compact else {}
        if not vectors:
            return {}, {}
        # Factors that a merge sets back are in the next round's base as well.
        base = next(iter(vectors.values())).base
        tensors = {f"expert_base.{name}": value for name, value in base.items() if value is not self.base[name]}
        tensors |= _named("experts", {task: vector.tensors for task, vector in vectors.items()})
        tensors |= _named("expert_heads", self.expert_heads)
        return {
            "weights": self.weights,
            "mixing": None if self.mixing is None else self.mixing.tolist(),
            "scale": self.scale,
            "step_size": self.step_size,
            "factors": {task: vector.factor for task, vector in vectors.items()},
        }, tensors

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], mid_round: bool) -> None:
        """Counterpart of `state`; the live model already holds the checkpoint's weights."""
        self.origin = _group(tensors, "origin", self.space)
        self.load_weights(tensors)
        self.open()
        if mid_round:
            self._load_round(values, tensors)
        self.load_experts(values, tensors)

    def _load_round(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.base = _group(tensors, "base", self.space)
        self.base_statistics = under(tensors, "base_statistics")
        self.norms = {task: float(norm) for task, norm in values["norms"].items()}
        self.sum = _group(tensors, "sum", self.space)
        self.weight_sum = _group(tensors, "weight_sum", self.space)
        self.sketches = _group(tensors, "sketch", self.space)
        for task in self.norms:
            if not self.streaming:
                stored = _group(tensors, f"task_vectors.{task}", self.space)
                self.vectors[task] = self.space.revive(self.start, stored)
                if self.entrywise:
                    self.entry_weights[task] = _group(tensors, f"entry_weights.{task}", self.space)
            if self.statistics:
                self.task_statistics[task] = under(tensors, f"task_statistics.{task}")
            self.heads[task] = under(tensors, f"heads.{task}")

    def load_experts(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Load the experts of a checkpoint's last merge, and what `last_move` needs; none if it holds none."""
        self.merged_vectors, self.expert_heads = {}, {}
        self.outer.velocity = _group(tensors, "outer.velocity", self.space)
        merge = values.get("last_merge")
        if not merge:
            return
        base = {**self.base, **_group(tensors, "expert_base", self.space)}
        for task, factor in merge["factors"].items():
            vector = self.space.revive(base, _group(tensors, f"experts.{task}", self.space))
            vector.factor = factor
            self.merged_vectors[task] = vector
            self.expert_heads[task] = under(tensors, f"expert_heads.{task}")
        self._weigh(merge["weights"])
        self.mixing = None if merge["mixing"] is None else torch.tensor(merge["mixing"], dtype=torch.float64)
        self.scale, self.step_size = merge["scale"], merge["step_size"]

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights that a checkpoint of the Trainer lacks, from `tensors` as `state` gave them."""
        self.space.load_checkpoint_weights(under(tensors, "weights"))
        if self.statistics:
            self._write_statistics(under(tensors, "statistics"))


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose dotted names begin with `prefix`, by the rest of their names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _named(kind: str, by_task: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}.{task}.{name}": value for task, values in by_task.items() for name, value in values.items()}


def _group(tensors: Mapping[str, Tensor], prefix: str, space: Space) -> dict[str, Tensor]:
    device = getattr(space, "device", "cpu")
    return {name: tensor.to(device) for name, tensor in sorted(under(tensors, prefix).items())}
