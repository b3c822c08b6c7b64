"""What a round's base and task vectors consist of: whole weights, or the updates that LoRA adapters stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TaskVector(Mapping[str, Tensor]):
    """A task vector by name, float32, optionally scaled on reading.

    Args:
        factor (`float`, *optional*, defaults to 1.0): multiplies what is read (clipping).
    """

    factor: float = 1.0

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The unscaled tensor."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold to restore the vector bit by bit."""

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.read(name)
        return tensor if self.factor == 1.0 else tensor * self.factor


class DenseTaskVector(TaskVector):
    """A task vector held as one tensor per name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Space(ABC):
    """The shared part of a model, as a merge sees it.

    `base` is a mapping of float32 tensors that `snapshot` takes and the other methods work on; its names are those of
    live parameters. Task vectors have the names in `shapes`, which may differ (a LoRA module has two factors in the
    base and one update in a task vector).
    """

    #: `True` when a task vector is much smaller than the weights it moves, so that holding all of them is cheap.
    compact = False

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Name and shape of every tensor in a task vector."""

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the live values, float32."""

    @abstractmethod
    def restore(self, base: Mapping[str, Tensor]) -> None:
        """Write a snapshot back into the live model, in place."""

    @abstractmethod
    def difference(self, base: Mapping[str, Tensor], name: str) -> Tensor:
        """One tensor of the live model's task vector, a new float32 tensor."""

    @abstractmethod
    def capture(self, base: Mapping[str, Tensor]) -> TaskVector:
        """The live model's whole task vector."""

    @abstractmethod
    def revive(self, base: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> TaskVector:
        """A task vector from what its `tensors` held."""

    @abstractmethod
    def advance(self, base: dict[str, Tensor], move: Mapping[str, Tensor]) -> None:
        """Add a merged move to `base`, in place, and write it into the live model."""

    @abstractmethod
    @contextmanager
    def probe(self, base: Mapping[str, Tensor], move: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
        """The live model at `base` + `scale` x `move` for as long as the context lasts, then at `base`."""

    def checkpoint_weights(self) -> dict[str, Tensor]:
        """Weights that a merge changes and the Trainer's own checkpoint lacks."""
        return {}

    def load_checkpoint_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Counterpart of `checkpoint_weights`."""
        if tensors:
            raise ValueError(
                f"The checkpoint holds weights that this model does not keep apart: {sorted(tensors)[:3]}."
            )


class WeightSpace(Space):
    """Shared parameters taken as they are.

    Args:
        parameters (`Mapping[str, nn.Parameter]`): live float32 parameters by name.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where base and task vectors live.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device | str = "cpu") -> None:
        self.parameters = dict(sorted(parameters.items()))
        self.device = torch.device(device)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def snapshot(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach().to(self.device, torch.float32, copy=True)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def restore(self, base: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(base[name])

    def difference(self, base: Mapping[str, Tensor], name: str) -> Tensor:
        return self.parameters[name].detach().to(self.device, torch.float32) - base[name]

    def capture(self, base: Mapping[str, Tensor]) -> DenseTaskVector:
        return DenseTaskVector({name: self.difference(base, name) for name in self.parameters})

    def revive(self, base: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> DenseTaskVector:
        return DenseTaskVector(tensors)

    def advance(self, base: dict[str, Tensor], move: Mapping[str, Tensor]) -> None:
        for name in self.parameters:
            base[name].add_(move[name])
        self.restore(base)

    @contextmanager
    def probe(self, base: Mapping[str, Tensor], move: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(base[name] + scale * move[name])
            yield
        finally:
            self.restore(base)
