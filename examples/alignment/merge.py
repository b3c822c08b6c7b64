"""Networks from different seeds as one: averaged as they are, by Git Re-Basin, MergeMany and C2M3, without and with REPAIR.

    python examples/alignment/merge.py runs/alignment/eurosat32/resnet20-ln-x3

Prints accuracy and loss on test pictures, and writes them to `merge.json` beside the networks.
"""

from __future__ import annotations

import statistics
import time

from measure import parser, read_family, save_results, table


METHODS = ("naive", "git-rebasin", "merge-many", "c2m3")


def main() -> None:
    arguments = parser(__doc__, models=5)
    arguments.add_argument("--methods", nargs="+", default=METHODS, help="'activations' is one more")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    family = read_family(options)
    ends = [family.score(network) for network in family.networks]
    results = {"endpoints": [{"accuracy": accuracy, "loss": loss} for accuracy, loss in ends], "merged": {}}
    means = [statistics.mean(column) for column in zip(*ends, strict=True)]
    rows = [[f"endpoints, mean of {len(ends)}", *means, "", "", ""]]
    for method in options.methods:
        started = time.perf_counter()
        states = family.aligned(method, options.seed)
        seconds = time.perf_counter() - started
        merged = family.mean(states)
        plain, repaired = family.score(merged), family.score(family.repaired(merged, states))
        results["merged"][method] = {
            "accuracy": plain[0],
            "loss": plain[1],
            "accuracy, REPAIR": repaired[0],
            "loss, REPAIR": repaired[1],
            "seconds": seconds,
        }
        rows.append([method, *plain, *repaired, f"{seconds:.0f}"])
        print(f"{method}: {plain[0]:.3f}, with REPAIR {repaired[0]:.3f}", flush=True)
    save_results(options.folder / "merge.json", results)
    header = ["", "accuracy", "loss", "accuracy, REPAIR", "loss, REPAIR", "seconds to align"]
    print(f"\n{options.folder}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
