"""From network A to B, to C and back to A: maps found pair by pair, and maps through a common universe.

    python examples/alignment/cycle.py runs/alignment/fashion_mnist/mlp-512-512-512-256

Git Re-Basin matches each pair by itself, so that the way around ends in another order of A's units: a network that computes
the same, and lies elsewhere. Printed, and written to `cycle.json`: the share of units that come back to their place, and the
loss barrier and the accuracy of the midpoint between A and what A has become. Mean over cycles of three of the networks.
"""

from __future__ import annotations

import itertools
import statistics

import numpy as np
from measure import Family, parser, read_family, save_results, table

from hf_atm.alignment import Permutation, align, loss_barrier


def around(family: Family, method: str, cycle: tuple[int, ...], seed: int) -> Permutation:
    """What the maps along a cycle come to."""
    networks = [family.networks[index] for index in cycle]
    if method == "git-rebasin":
        pairs = zip(networks, [*networks[1:], networks[0]], strict=True)
        steps = [align(pair, family.spec, method, heads=[], seed=seed).map(0, 1) for pair in pairs]
    else:
        found = align(networks, family.spec, method, heads=[], seed=seed)
        steps = [found.map(source, (source + 1) % len(cycle)) for source in range(len(cycle))]
    whole, *rest = steps
    for step in rest:
        whole = step.compose(whole)
    return whole


def main() -> None:
    arguments = parser(__doc__, models=5)
    arguments.add_argument("--cycles", type=int, default=3, help="how many cycles of three")
    arguments.add_argument("--steps", type=int, default=5, help="networks looked at for a barrier")
    options = arguments.parse_args()
    family = read_family(options)
    cycles = list(itertools.combinations(range(len(family.networks)), 3))[: options.cycles]
    if not cycles:
        raise ValueError("A cycle takes three networks; give --models 3 and train as many.")
    results, rows = {}, []
    for method in ("git-rebasin", "merge-many", "c2m3"):
        found = []
        for seed, cycle in enumerate(cycles):
            whole = around(family, method, cycle, seed)
            start = family.networks[cycle[0]]
            there = whole.apply(dict(start.state_dict()))
            units = np.concatenate([vector == np.arange(len(vector)) for vector in whole.vectors.values()])
            barrier = loss_barrier(start, there, lambda model: family.score(model)[1], options.steps)
            midpoint = family.mean([dict(start.state_dict()), there])
            found.append(
                {
                    "fixed": float(units.mean()),
                    "barrier": barrier,
                    "A": family.score(start)[0],
                    "midpoint": family.score(midpoint)[0],
                }
            )
        results[method] = found
        rows.append([method, *(statistics.mean(one[key] for one in found) for key in found[0])])
    save_results(options.folder / "cycle.json", results)
    header = ["", "units that come back", "loss barrier to A", "accuracy of A", "accuracy of the midpoint"]
    print(f"{options.folder}, {len(cycles)} cycles\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
