"""What the loop measures about its own rounds. Sketches of a megabyte stand for whole vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .analysis.conditions import cosine, gradient_identity
from .analysis.diagnose import diagnose
from .geometry import Sketch
from .moments import inner_optimizer
from .spaces import Space


class RoundDiagnostics:
    """Measures the rounds of one run.

    Args:
        level (`str`): `"cheap"`, or `"full"` to have every task vector's signs and singular vectors compared too.
        space (`Space`): the shared part of the model.
        anchored (`bool`): whether task vectors and moves are measured from the run's start.
    """

    def __init__(self, level: str, space: Space, anchored: bool) -> None:
        self.level = level
        self.anchored = anchored
        self.shapes = space.shapes
        self.numel = sum(shape.numel() for shape in self.shapes.values())
        # Sketches of the first gradient of each segment, and the learning rates of its steps added up.
        self.gradients: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        # Sketches of the last move, and of all of them together.
        self.moves: dict[str, Tensor] = {}

    def sketch(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sketch, on the CPU, of a vector whose tensors come in the order of the space's shapes."""
        sketch: Sketch | None = None
        for tensor in tensors:
            sketch = sketch or Sketch(self.numel, tensor.device)
            sketch.add(tensor)
        assert sketch is not None
        return sketch.values.cpu()

    def add_step(self, task: str, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Take note of an optimizer step about to be made: of its gradient, where it is the segment's first.

        Args:
            task (`str`): whose segment it is.
            parameters (`Mapping[str, Tensor]`): the shared ones, with their gradients.
            optimizer: theirs.
        """
        # An adapter's task vectors are products, which have no gradient of their own.
        if self.anchored or self.shapes.keys() != parameters.keys():
            return
        if task not in self.gradients:
            self.gradients[task] = self.sketch(_gradient(parameters[name]) for name in self.shapes)
            self.rates[task] = 0.0
        first = next(iter(parameters.values()))
        groups = inner_optimizer(optimizer).param_groups
        self.rates[task] += next(g["lr"] for g in groups if any(first is p for p in g["params"]))

    def observe(
        self,
        vectors: Mapping[str, Mapping[str, Tensor]],
        sketches: Mapping[str, Tensor],
        move: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """Measure a round that is about to end.

        Args:
            vectors (`Mapping[str, Mapping[str, Tensor]]`): task vectors, where they are held.
            sketches (`Mapping[str, Tensor]`): their sketches, where they are not.
            move (`Mapping[str, Tensor]`): how the base will move.

        Returns:
            `dict`: `drift` and `drift_from_start`, norms of this move and of all so far; `outer_persistence`, cosine
            between this move and the last one; per task, `gradient_cosines` and `gradient_distances`, see
            [`gradient_identity`]; under `"full"`, `task_vectors`, see [`Diagnosis`]. Whatever is made of sketches is
            right to about 0.002 of its size.
        """
        last, latest = self.moves.get("last"), self.sketch(move[name] for name in self.shapes)
        before = self.moves.get("all", torch.zeros_like(latest))
        self.moves["all"] = latest if self.anchored else before + latest
        self.moves["last"] = self.moves["all"] - before
        result: dict[str, Any] = {
            "drift": float(torch.linalg.vector_norm(self.moves["last"])),
            "drift_from_start": float(torch.linalg.vector_norm(self.moves["all"])),
            "outer_persistence": None if last is None else cosine(last, self.moves["last"]),
        }
        if self.gradients:
            pairs = {}
            for task, gradient in sorted(self.gradients.items()):
                held = sketches.get(task)
                vector = self.sketch(vectors[task][name] for name in self.shapes) if held is None else held.cpu()
                pair = gradient_identity(vector, gradient, self.rates[task])
                if pair is not None:
                    pairs[task] = pair
            result["gradient_cosines"] = {task: pair[0] for task, pair in pairs.items()}
            result["gradient_distances"] = {task: pair[1] for task, pair in pairs.items()}
        if self.level == "full":
            result["task_vectors"] = diagnose(vectors, move).to_dict()
        self.gradients, self.rates = {}, {}
        return result

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint must hold: JSON-ready values, and tensors by dotted name."""
        tensors = {f"diagnostics.moves.{name}": tensor for name, tensor in self.moves.items()}
        tensors |= {f"diagnostics.gradients.{task}": tensor for task, tensor in self.gradients.items()}
        return {"rates": self.rates}, tensors

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Counterpart of `state`."""
        self.rates = {task: float(rate) for task, rate in values.get("rates", {}).items()}
        for kind, held in (("moves", self.moves), ("gradients", self.gradients)):
            prefix = f"diagnostics.{kind}."
            held.update({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def midpoint_barriers(
    tasks: Sequence[str],
    losses_at: Callable[[str, float], float],
) -> dict[str, float]:
    """Loss barrier halfway between each expert and the merged model, on the expert's own task.

    Args:
        tasks (`Sequence[str]`): the tasks.
        losses_at (`Callable[[str, float], float]`): loss of a task at a share of the way from the merged model (0) to
            its expert (1).

    Returns:
        `dict[str, float]`: loss at the midpoint above the mean of both ends; at most 0 within one basin.
    """
    barriers = {}
    for task in tasks:
        merged, middle, expert = (losses_at(task, share) for share in (0.0, 0.5, 1.0))
        barriers[task] = middle - (merged + expert) / 2
    return barriers
