"""Elastic weight consolidation: what mattered to earlier tasks is held in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback


class Consolidation:
    """How much each shared weight matters to earlier tasks, and where they left it.

    Args:
        importance (`Mapping[str, Tensor]`): Fisher information summed over earlier tasks, by parameter name, float32.
        anchor (`Mapping[str, Tensor]`): the weights they were measured at.
    """

    def __init__(self, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        self.importance = dict(importance)
        self.anchor = dict(anchor)

    def extended(self, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Consolidation:
        """With another task's information added, all of it anchored at the newest weights (online EWC)."""
        total = {name: value + self.importance.get(name, 0) for name, value in importance.items()}
        return Consolidation(total, anchor)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"importance/{name}": tensor.contiguous() for name, tensor in self.importance.items()}
        tensors |= {f"anchor/{name}": tensor.contiguous() for name, tensor in self.anchor.items()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Consolidation:
        """Counterpart of [`save`]."""
        parts: dict[str, dict[str, Tensor]] = {"importance": {}, "anchor": {}}
        for key, tensor in load_file(path).items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        return cls(parts["importance"], parts["anchor"])


class ElasticWeightConsolidation(TrainerCallback):
    """Adds the gradient of `strength * sum_i F_i (theta_i - theta*_i)**2 / 2` before every optimizer step (https://huggingface.co/papers/1612.00796).

    The gradient is added after clipping, so the pull back does not depend on how steep the new task is.

    Args:
        model (`nn.Module`): the model in training.
        consolidation ([`Consolidation`]): of earlier tasks.
        strength (`float`): mu, above 0.
    """

    def __init__(self, model: nn.Module, consolidation: Consolidation, strength: float) -> None:
        parameters = dict(model.named_parameters())
        unknown = sorted(set(consolidation.importance) - set(parameters))
        if unknown:
            raise ValueError(f"The consolidated weights {unknown[:3]} are not in this model.")
        self.terms = [
            (
                parameters[name],
                (strength * value).to(parameters[name].device),
                consolidation.anchor[name].to(parameters[name].device),
            )
            for name, value in consolidation.importance.items()
        ]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, factor, anchor in self.terms:
            if parameter.grad is not None:
                parameter.grad.addcmul_(factor, parameter - anchor)
