"""What the loop measures about its own rounds. Sketches of a megabyte stand for whole vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .analysis.conditions import gradient_identity
from .analysis.diagnose import diagnose
from .geometry import Sketch, cosine
from .moments import inner_optimizer
from .spaces import Space


if TYPE_CHECKING:
    from .rounds import RoundState


class RoundDiagnostics:
    """Measures the rounds of one run.

    Args:
        level (`str`): `"cheap"`, or `"full"` to have every task vector's signs and singular vectors compared too.
        space (`Space`): the shared part of the model.
        parameters (`Mapping[str, Tensor]`): its live parameters.
        anchored (`bool`): whether task vectors and moves are measured from the run's start.
    """

    def __init__(self, level: str, space: Space, parameters: Mapping[str, Tensor], anchored: bool) -> None:
        self.level = level
        self.parameters = parameters
        self.anchored = anchored
        self.shapes = space.shapes
        self.numel = sum(shape.numel() for shape in self.shapes.values())
        # An adapter's task vectors are products, which have no gradient of their own.
        self.has_gradients = not anchored and self.shapes.keys() == parameters.keys()
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

    def add_step(self, task: str, optimizer: Any) -> None:
        """Take note of an optimizer step about to be made: of its gradient, where it is the segment's first.

        Args:
            task (`str`): whose segment it is.
            optimizer: that of the shared parameters, which have their gradients.
        """
        if not self.has_gradients:
            return
        if task not in self.gradients:
            self.gradients[task] = self.sketch(_gradient(self.parameters[name]) for name in self.shapes)
            self.rates[task] = 0.0
        first = next(iter(self.parameters.values()))
        groups = inner_optimizer(optimizer).param_groups
        self.rates[task] += next(g["lr"] for g in groups if any(first is p for p in g["params"]))

    def observe(
        self,
        rounds: RoundState,
        validation: Callable[[Sequence[str]], Mapping[str, float]] | None,
        move: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """Measure a round that is about to end.

        Args:
            rounds (`RoundState`): with its task vectors, or their sketches.
            validation (`Callable`, *optional*): validation losses of the live model on the tasks it is given.
            move (`Mapping[str, Tensor]`): how the base will move.

        Returns:
            `dict`: `drift` and `drift_from_start`, norms of this move and of all so far; `outer_persistence`, cosine
            between this move and the last one; per task, `gradient_cosines` and `gradient_distances`, see
            [`gradient_identity`]; under `"full"`, `task_vectors`, see [`Diagnosis`], and with validation data
            `barriers`, per task. Whatever is made of sketches is right to about 0.002 of its size.
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
                held = rounds.sketches.get(task)
                vector = (
                    self.sketch(rounds.vectors[task][name] for name in self.shapes) if held is None else held.cpu()
                )
                pair = gradient_identity(vector, gradient, self.rates[task])
                if pair is not None:
                    pairs[task] = pair
            result["gradient_cosines"] = {task: pair[0] for task, pair in pairs.items()}
            result["gradient_distances"] = {task: pair[1] for task, pair in pairs.items()}
        if self.level == "full":
            result["task_vectors"] = diagnose(rounds.vectors, move).to_dict()
            if validation is not None:
                result["barriers"] = {task: _barrier(rounds, task, move, validation) for task in rounds.tasks}
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


def _barrier(
    rounds: RoundState,
    task: str,
    move: Mapping[str, Tensor],
    validation: Callable[[Sequence[str]], Mapping[str, float]],
) -> float:
    """Loss halfway between a task's expert and the merged model, above the mean of both; at most 0 within one basin."""
    vector, losses = rounds.vectors[task], []
    for share in (0.0, 0.5, 1.0):
        between = {name: (1 - share) * move[name] + share * vector[name] for name in move}
        with rounds.space.probe(rounds.start, between):
            losses.append(validation([task])[task])
    return losses[1] - (losses[0] + losses[2]) / 2
