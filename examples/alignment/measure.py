"""What the measurements share: trained networks, brought into one frame, averaged, repaired and scored."""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import build
from pictures import Pictures, read_pictures
from safetensors.torch import load_file
from torch import Tensor, nn
from train import kind_of, score

from hf_atm import merge_state_dicts
from hf_atm.alignment import PermutationSpec, align, mlp_spec, repair, resnet_spec, spec_for


State = dict[str, Tensor]


@dataclass
class Family:
    """Networks of one kind from different seeds, the pictures they learned, and which of those REPAIR sees."""

    networks: list[nn.Module]
    spec: PermutationSpec
    data: Pictures
    seen: list[Tensor]

    @property
    def states(self) -> list[State]:
        return [dict(network.state_dict()) for network in self.networks]

    def network(self, state: State) -> nn.Module:
        """A network with given weights."""
        result = copy.deepcopy(self.networks[0])
        result.load_state_dict(state)
        return result

    def mean(self, states: Sequence[State], weights: Sequence[float] | None = None) -> nn.Module:
        """The average of some weights."""
        return self.network(merge_state_dicts(states, weights=weights))

    def repaired(self, network: nn.Module, endpoints: Sequence[State]) -> nn.Module:
        """A copy whose activations have the moments of the endpoints'; of BatchNorm, its own statistics."""
        return repair(network, endpoints, self.seen)

    def score(self, network: nn.Module) -> tuple[float, float]:
        """Accuracy and loss on test pictures."""
        return score(network, self.data.test_images, self.data.test_labels)

    def aligned(self, method: str, seed: int = 0, order: Sequence[int] | None = None) -> list[State]:
        """
        The networks in one frame.

        Args:
            method (`str`): `"naive"` leaves them as they are, `"git-rebasin"` maps all onto the first, the others are those
                of [`align`].
            seed (`int`, *optional*, defaults to 0): of [`align`].
            order (`Sequence[int]`, *optional*): positions of the networks to use, in their order.
        """
        networks = [self.networks[index] for index in (range(len(self.networks)) if order is None else order)]
        if method == "naive":
            return [dict(network.state_dict()) for network in networks]
        if method == "git-rebasin":
            first, *others = networks
            pairs = [align([first, other], self.spec, method, heads=[], seed=seed) for other in others]
            moved = [pair.map(1, 0).apply(dict(other.state_dict())) for pair, other in zip(pairs, others, strict=True)]
            return [dict(first.state_dict()), *moved]
        data = self.seen if method == "activations" else None
        return list(align(networks, self.spec, method, data, heads=[], seed=seed).state_dicts)


def spec_of(network: str, model: nn.Module) -> PermutationSpec:
    kind = kind_of(network)
    if kind == "vit":
        return spec_for(model.model)
    return resnet_spec(model) if kind == "resnet" else mlp_spec(model)


def parser(description: str | None, models: int) -> argparse.ArgumentParser:
    """Options that every measurement has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("folder", type=Path, help="what train.py wrote, such as runs/alignment/DATASET/NETWORK")
    result.add_argument("--data", type=Path, default=Path("../shared/data/vision"), help="folder of data sets")
    result.add_argument("--models", type=int, default=models, help="how many of the networks")
    result.add_argument("--test", type=int, help="how many test pictures; all by default")
    result.add_argument("--repair", type=int, default=1000, help="training pictures that REPAIR sees")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def read_family(options: argparse.Namespace) -> Family:
    """The networks of a folder, in float32."""
    files = sorted(options.folder.glob("seed-*.safetensors"))[: options.models]
    if len(files) < 2:
        raise FileNotFoundError(f"{options.folder} holds {len(files)} networks; train at least two with train.py.")
    name = options.folder.resolve().name
    data = read_pictures(options.data / options.folder.resolve().parent.name, options.device, options.test)
    networks = []
    for file in files:
        network = build(name, data.shape, data.classes)
        network.load_state_dict(load_file(file))
        networks.append(network.to(options.device).eval())
    return Family(networks, spec_of(name, networks[0]), data, data.batches(options.repair))


def orders(count: int, number: int) -> list[list[int]]:
    """Orders of the networks, each of which starts with another one as long as there are others."""
    draw = random.Random(0)
    result = []
    for index in range(number):
        rest = [item for item in range(count) if item != index % count]
        draw.shuffle(rest)
        result.append([index % count, *rest])
    return result


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; floats with three digits."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def save_results(file: Path, results: Any) -> None:
    """Writes JSON, beside the file first."""
    beside = file.with_name(f"{file.name}.tmp")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)
