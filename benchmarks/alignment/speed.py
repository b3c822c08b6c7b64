"""Time and objective of C2M3 beside the published algorithm written out pair by pair, and time by number of models.

    python benchmarks/alignment/speed.py            # three ResNet-20s, five MLPs, 2 to 10 models; about twenty minutes
    python benchmarks/alignment/speed.py --repeats 1 --only scaling

Networks are copies of one, in random orders, each entry disturbed by .7 of its tensor's deviation; or trained from
different seeds, on a mixture of Gaussians. Arms alternate. Both threads' processor time stands beside the wall's, which
other work on the machine changes more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

import pairwise  # noqa: E402
from tests.alignment.networks import ResNet, mlp, one_group, planted  # noqa: E402

from hf_atm.alignment import align, mlp_spec, resnet_spec  # noqa: E402
from hf_atm.alignment.problem import build_problem, objective  # noqa: E402


SIZES = (784, 512, 512, 512, 256, 26)
PARTS = ("planted-resnet", "planted-mlp", "trained-resnet", "trained-mlp", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--skip-pairwise", action="store_true")
    options = parser.parse_args()
    chosen = PARTS if options.only is None else (options.only,)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    if chosen != ("scaling",):
        print("| networks | arm | seconds | processor seconds | objective |\n|---|---|---|---|---|")
    for part in chosen:
        if part != "scaling":
            compare(part, options.repeats, options.skip_pairwise)
    if "scaling" in chosen:
        by_number(options.repeats)


def compare(part: str, repeats: int, skip_pairwise: bool) -> None:
    origin, kind = part.split("-")
    count, shape = (3, (3, 32, 32)) if kind == "resnet" else (5, (784,))
    spec = (resnet_spec if kind == "resnet" else mlp_spec)(network(kind))
    if origin == "planted":
        states = planted(network(kind), spec, count, noise=0.7)[1]
    else:
        states = [trained(kind, seed, shape, 20 if kind == "resnet" else 300) for seed in range(count)]
    problem = build_problem(spec, states, [n for n, v in states[0].items() if any(spec.axes_of(n, v.ndim))], None)
    arms: dict[str, Callable[[], float]] = {
        "align, its four starts": lambda: align(states, spec).objective,
        "align, one start": lambda: align(states, spec, starts=("identity",)).objective,
        "pair by pair, one start": lambda: objective(problem, pairwise.match(problem)),
    }
    if skip_pairwise:
        arms.popitem()
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    value: dict[str, float] = {}
    for _ in range(repeats):
        for name, arm in arms.items():
            begin = time.perf_counter(), time.process_time()
            value[name] = arm()
            spent[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    for name, times in spent.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {count} {part} | {name} | {wall:.1f} | {processor:.1f} | {value[name]:.2f} |", flush=True)


def by_number(repeats: int) -> None:
    """Ten iterations on 2 to 10 MLPs, and what a straight line through the times leaves unexplained."""
    spec = mlp_spec(network("mlp"))
    states = planted(network("mlp"), spec, 10, noise=0.7)[1]
    counts = range(2, 11)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            begin = time.process_time()
            found = align(states[:count], spec, starts=("identity",), max_iter=10, tol=0, polish=0)
            seconds[count].append((time.process_time() - begin) / found.report["iterations"])
    print("\n| MLPs | processor seconds per iteration | per model |\n|---|---|---|")
    medians = [statistics.median(seconds[count]) for count in counts]
    for count, median in zip(counts, medians, strict=True):
        print(f"| {count} | {median:.3f} | {median / count:.4f} |")
    slope, start = np.polyfit(counts, medians, 1)
    rest = np.array(medians) - start - slope * np.array(counts)
    growth = np.polyfit(np.log(counts), np.log(medians), 1)[0]
    print(f"\n{start:.3f} + {slope:.3f} n seconds, R^2 {1 - rest.var() / np.var(medians):.4f}; n to the {growth:.2f}")


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(one_group) if kind == "resnet" else mlp(*SIZES)


def trained(kind: str, seed: int, shape: tuple[int, ...], steps: int) -> dict[str, torch.Tensor]:
    """A network from a seed of its own, trained a little on a mixture of Gaussians that all seeds share."""
    classes = 10 if kind == "resnet" else 26
    centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    model = ResNet(one_group) if kind == "resnet" else mlp(*SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    for _ in range(steps):
        labels = torch.randint(classes, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(centres[labels] + 3 * torch.randn(64, *shape)), labels).backward()
        optimizer.step()
    return model.state_dict()


if __name__ == "__main__":
    main()
