"""The part of a round that a checkpoint has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    start: Any
    open: Callable[[], None]
    _read_statistics: Callable[[], dict[str, Tensor]]
    _write_statistics: Callable[[Mapping[str, Tensor]], None]

    def state(self, mid_round: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint must hold beside the Trainer's own: JSON-ready values, and tensors by dotted name."""
        tensors = {f"outer.velocity.{name}": tensor for name, tensor in self.outer.velocity.items()}
        tensors |= {f"origin.{name}": tensor for name, tensor in self.origin.items()}
        tensors |= {f"weights.{name}": tensor for name, tensor in self.space.checkpoint_weights().items()}
        # The Trainer's checkpoint of an adapter holds no buffers.
        tensors |= {f"statistics.{name}": tensor for name, tensor in self._read_statistics().items()}
        if not mid_round:
            return {}, tensors
        tensors |= {f"base.{name}": tensor for name, tensor in self.base.items()}
        tensors |= {f"base_statistics.{name}": tensor for name, tensor in self.base_statistics.items()}
        tensors |= {f"sum.{name}": tensor for name, tensor in self.sum.items()}
        tensors |= {f"weight_sum.{name}": tensor for name, tensor in self.weight_sum.items()}
        tensors |= {f"sketch.{task}": tensor for task, tensor in self.sketches.items()}
        for kind, by_task in (
            ("task_vectors", {task: vector.tensors for task, vector in self.vectors.items()}),
            ("task_statistics", self.task_statistics),
            ("entry_weights", self.entry_weights),
        ):
            for task, values in by_task.items():
                tensors |= {f"{kind}.{task}.{name}": tensor for name, tensor in values.items()}
        return {"norms": self.norms}, tensors

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], mid_round: bool) -> None:
        """Counterpart of `state`; the live model already holds the checkpoint's weights."""
        self.outer.velocity = _group(tensors, "outer.velocity", self.space)
        self.origin = _group(tensors, "origin", self.space)
        self.load_weights(tensors)
        self.open()
        if not mid_round:
            return
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

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights that a checkpoint of the Trainer lacks, from `tensors` as `state` gave them."""
        self.space.load_checkpoint_weights(under(tensors, "weights"))
        if self.statistics:
            self._write_statistics(under(tensors, "statistics"))


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose dotted names begin with `prefix`, by the rest of their names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _group(tensors: Mapping[str, Tensor], prefix: str, space: Space) -> dict[str, Tensor]:
    device = getattr(space, "device", "cpu")
    return {name: tensor.to(device) for name, tensor in sorted(under(tensors, prefix).items())}
