"""ViTs from different seeds: merged as they are or aligned, and tuned a few steps from there.

    python examples/alignment/train.py vit-128-3 --seeds 0 1 2
    python examples/alignment/transformers_from_seeds.py runs/alignment/mnist/vit-128-3

Permutations do not solve transformers: their mean is far below its endpoints, yet a better start for tuning than the naive mean or
random weights. Printed for every pair of networks together, and written to `tuning.json`: accuracy after some steps of tuning.
"""

from __future__ import annotations

import itertools

import torch
from measure import Family, parser, read_family, save_results, spread, table
from networks import build
from torch import nn
from torch.nn.functional import cross_entropy


METHODS = ("c2m3", "activations", "naive", "random")


def start_of(family: Family, method: str, pair: tuple[int, int], name: str, repaired: bool) -> nn.Module:
    """The network that tuning starts from."""
    if method == "random":
        torch.manual_seed(1000 + pair[0])
        return build(name, family.data.shape, family.data.classes).to(family.data.train_images.device)
    states = family.aligned(method, order=pair)
    merged = family.mean(states)
    return family.repaired(merged, states) if repaired else merged


def tune(family: Family, model: nn.Module, steps: list[int], rate: float, batch_size: int) -> list[float]:
    """Test accuracy after each number of steps; batches and rate are the same for every start."""
    data = family.data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    result = []
    for step in range(max(steps) + 1):
        if step in steps:
            result.append(family.score(model)[0])
        rows = torch.randint(len(data.train_labels), (batch_size,), generator=generator).to(data.train_labels.device)
        model.train()
        loss = cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result


def main() -> None:
    arguments = parser(__doc__, models=3)
    arguments.add_argument("--steps", type=int, nargs="+", default=[0, 10, 30, 120])
    arguments.add_argument("--rate", type=float, default=1e-3)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--repaired", action="store_true", help="tune from the mean after REPAIR")
    options = arguments.parse_args()
    family = read_family(options)
    name = options.folder.resolve().name
    pairs = list(itertools.combinations(range(len(family.networks)), 2))
    steps = sorted(set(options.steps))
    ends = [family.score(network)[0] for network in family.networks]
    results: dict[str, object] = {"endpoints": ends, "steps": steps}
    rows = []
    for method in METHODS:
        found = [
            tune(
                family, start_of(family, method, pair, name, options.repaired), steps, options.rate, options.batch_size
            )
            for pair in pairs
        ]
        results[method] = found
        rows.append([method, *(spread(column) for column in zip(*found, strict=True))])
        print(method, *rows[-1][1:], flush=True)
    save_results(options.folder / "tuning.json", results)
    print(f"\n{options.folder}, {len(pairs)} pairs, endpoints {spread(ends)}\n")
    print(table(["mean of two, steps of tuning", *steps], rows))


if __name__ == "__main__":
    main()
