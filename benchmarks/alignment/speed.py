"""Time and objective of C2M3 beside the published algorithm written out pair by pair, and time by number of models.

    python benchmarks/alignment/speed.py            # three ResNet-20s, five MLPs, 2 to 10 models; about ten minutes
    python benchmarks/alignment/speed.py --pairs 1 --skip-scaling

Networks are copies of one, in random orders, each entry disturbed by .7 of its tensor's deviation. Arms alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

import pairwise  # noqa: E402
from tests.alignment.networks import ResNet, mlp, one_group  # noqa: E402

from hf_atm.alignment import Permutation, align, mlp_spec, resnet_spec  # noqa: E402
from hf_atm.alignment.problem import build_problem, objective  # noqa: E402


SIZES = (784, 512, 512, 512, 256, 26)


def copies(model, spec, count, noise=0.7):
    generator = torch.Generator().manual_seed(0)
    states = []
    for seed in range(count):
        state = Permutation.random(spec, seed).apply(dict(model.state_dict()))
        for value in state.values():
            if value.is_floating_point() and value.numel() > 1:
                value.add_(torch.randn(value.shape, generator=generator) * noise * value.std())
        states.append(state)
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--skip-scaling", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = {
        "3 ResNet-20": (ResNet(one_group), resnet_spec, 3),
        f"5 MLPs {'-'.join(map(str, SIZES))}": (mlp(*SIZES), mlp_spec, 5),
    }
    print(
        "| networks | align, all starts | align, one start | pair by pair | ratio (one start) | objective / pair by pair |"
    )
    print("|---|---|---|---|---|---|")
    for name, (model, spec_of, count) in cases.items():
        spec = spec_of(model)
        states = copies(model, spec, count)
        problem = build_problem(spec, states, [n for n, v in states[0].items() if any(spec.axes_of(n, v.ndim))], None)
        seconds: dict[str, list[float]] = {"all": [], "one": [], "pairs": []}
        for _ in range(options.pairs):
            start = time.perf_counter()
            whole = align(states, spec)
            seconds["all"].append(time.perf_counter() - start)
            start = time.perf_counter()
            align(states, spec, starts=("identity",))
            seconds["one"].append(time.perf_counter() - start)
            start = time.perf_counter()
            vectors = pairwise.match(problem)
            seconds["pairs"].append(time.perf_counter() - start)
        every, one, pairs = (statistics.median(seconds[arm]) for arm in ("all", "one", "pairs"))
        ratio = whole.objective / objective(problem, vectors)
        print(
            f"| {name} | {every:.1f} s | {one:.1f} s | {pairs:.1f} s | {pairs / one:.1f} | {ratio:.4f} |", flush=True
        )
    if options.skip_scaling:
        return
    print("\n| models | seconds, one start | per model |\n|---|---|---|")
    model = mlp(*SIZES)
    spec = mlp_spec(model)
    states = copies(model, spec, 10)
    for count in range(2, 11, 2):
        start = time.perf_counter()
        found = align(states[:count], spec, starts=("identity",))
        spent = (time.perf_counter() - start) / found.report["iterations"]
        print(f"| {count} | {spent:.2f} per iteration | {spent / count:.3f} |", flush=True)


if __name__ == "__main__":
    main()
