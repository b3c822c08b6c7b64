"""How much a merge depends on the seed, and on the order of the networks.

    python examples/alignment/stability.py runs/alignment/fashion_mnist/mlp-512-512-512-256 --runs 5

Every method merges the same networks several times: with other seeds, and in other orders, the first network being the one that
Git Re-Basin maps the others onto. Printed, and written to `stability.json`: mean and standard deviation of the test accuracy,
after REPAIR with `--repaired`.
"""

from __future__ import annotations

from measure import Family, orders, parser, read_family, save_results, spread, table


def accuracy(family: Family, method: str, seed: int, order: list[int], repaired: bool) -> float:
    states = family.aligned(method, seed, order)
    merged = family.mean(states)
    return family.score(family.repaired(merged, states) if repaired else merged)[0]


def main() -> None:
    arguments = parser(__doc__, models=5)
    arguments.add_argument("--runs", type=int, default=5, help="seeds, and orders")
    arguments.add_argument("--repaired", action="store_true", help="score after REPAIR")
    options = arguments.parse_args()
    family = read_family(options)
    in_place = list(range(len(family.networks)))
    results, rows = {}, []
    for method in ("git-rebasin", "merge-many", "c2m3"):
        seeds = [accuracy(family, method, seed, in_place, options.repaired) for seed in range(options.runs)]
        places = [
            accuracy(family, method, 0, order, options.repaired) for order in orders(len(in_place), options.runs)
        ]
        results[method] = {"seeds": seeds, "orders": places}
        rows.append([method, spread(seeds), spread(places)])
        print(f"{method}: seeds {rows[-1][1]}, orders {rows[-1][2]}", flush=True)
    save_results(options.folder / "stability.json", results)
    print(f"\n{options.folder}\n\n{table(['', f'{options.runs} seeds', f'{options.runs} orders'], rows)}")


if __name__ == "__main__":
    main()
