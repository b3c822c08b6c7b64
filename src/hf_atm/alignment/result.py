"""What alignment returns: one order per model, and the maps between them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .permutation import Permutation
from .spec import PermutationSpec


_FORMAT = "hf_atm.alignment"


@dataclass(frozen=True)
class Alignment:
    """
    Models in one common frame, the universe.

    The universe is the frame of one of the models: all of them could be reordered together without a change, so this
    fixes what is free.

    Args:
        spec ([`PermutationSpec`]): groups and axes.
        permutations (`Sequence[Permutation]`): by model, in the order given to [`align`], universe to model.
        method (`str`): how they were found.
        objective (`float`): sum over pairs of models of the inner products of matched tensors (or features).
        history (`Sequence[float]`): objective through iterations, after rounding, and through the polish.
        report (`Mapping[str, Any]`): the model whose frame the universe is (`reference`), and for Frank-Wolfe the chosen
            `start` (`"mean"` for that of other runs' results), its `iterations`, `gap` and whether it `converged`, and the
            objective of all `starts`.
        state_dicts (`Sequence[dict[str, Tensor]]`): the models in the universe; empty after [`~Alignment.load`].
        soft_maps (`Sequence[Mapping[str, np.ndarray]]`): the matrices before rounding, by model and index vector, if kept.
    """

    spec: PermutationSpec
    permutations: Sequence[Permutation]
    method: str
    objective: float
    history: Sequence[float] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    state_dicts: Sequence[dict[str, Any]] = ()
    soft_maps: Sequence[Mapping[str, np.ndarray]] = ()

    def map(self, source: int, target: int) -> Permutation:
        """
        The order that takes model `source` to the frame of model `target`; maps around a cycle compose to the identity.

        Args:
            source, target (`int`): positions in the list given to [`align`].

        Returns:
            [`Permutation`]
        """
        return self._of(target).compose(self._of(source).inverse())

    def to_universe(self, index: int, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """
        Tensors of a model, seen from the universe.

        Args:
            index (`int`): the model's position in the list given to [`align`].
            state_dict (`Mapping[str, Tensor]`): any of its tensors by name: weights, a task vector, optimizer moments,
                LoRA factors under PEFT's names. Not changed.

        Returns:
            `dict[str, Tensor]`: new tensors with the same names.
        """
        return self._of(index).inverse().apply(state_dict)

    def from_universe(self, index: int, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """
        Tensors of the universe, such as those of a merged model, in the frame of one of the models.

        Args:
            index (`int`): the model's position in the list given to [`align`].
            state_dict (`Mapping[str, Tensor]`): as for [`~Alignment.to_universe`].

        Returns:
            `dict[str, Tensor]`: new tensors with the same names.
        """
        return self._of(index).apply(state_dict)

    def _of(self, index: int) -> Permutation:
        if not 0 <= index < len(self.permutations):
            raise ValueError(
                f"There is no model {index}; the alignment holds models 0 to {len(self.permutations) - 1}."
            )
        return self.permutations[index]

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes orders and soft maps into one safetensors file, the rest as JSON in its header; models are not written.

        Args:
            path (`str` or `os.PathLike`): the file; replaced when the new one is complete.
        """
        tensors = {
            f"{index}/{name}": torch.from_numpy(np.array(vector, dtype=np.int64))
            for index, permutation in enumerate(self.permutations)
            for name, vector in permutation.vectors.items()
        }
        for index, maps in enumerate(self.soft_maps):
            tensors |= {
                f"soft/{index}/{name}": torch.from_numpy(np.ascontiguousarray(matrix)) for name, matrix in maps.items()
            }
        facts = {
            "spec": self.spec.to_dict(),
            "method": self.method,
            "objective": self.objective,
            "history": list(self.history),
            "report": dict(self.report),
            "count": len(self.permutations),
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.tmp")
        # One entry: safetensors writes several in another order in every process.
        save_file(tensors, beside, metadata={_FORMAT: json.dumps(facts)})
        os.replace(beside, target)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Alignment:
        """
        Reads what [`~Alignment.save`] wrote.

        Raises:
            `ValueError`: if the file holds no alignment.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(_FORMAT)
                tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file ({error}); give one that Alignment.save wrote."
            ) from error
        if header is None:
            raise ValueError(f"{path} holds no alignment; give a file that Alignment.save wrote.")
        facts = json.loads(header)
        spec = PermutationSpec.from_dict(facts["spec"])
        count = facts["count"]
        permutations = [Permutation(spec, _below(tensors, f"{index}/")) for index in range(count)]
        soft = [_below(tensors, f"soft/{index}/") for index in range(count)]
        return cls(
            spec=spec,
            permutations=permutations,
            method=facts["method"],
            objective=facts["objective"],
            history=facts["history"],
            report=facts["report"],
            soft_maps=soft if any(soft) else (),
        )


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
