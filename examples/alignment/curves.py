"""Loss on the way from one network to another: as they are, aligned by C2M3, and repaired as well.

    python examples/alignment/curves.py runs/alignment/eurosat32/resnet20-ln-x3

Prints loss barriers, draws `curves.png` and writes `curves.json` beside the networks. With more `--models` than two, all of them
are aligned together and the first two looked at.
"""

from __future__ import annotations

from math import gcd

from measure import Family, State, parser, read_family, save_results, table
from torch import nn

from hf_atm.analysis.landscape import barrier_height
from hf_atm.figures.canvas import MARKS, STYLES, canvas


def between(family: Family, ends: list[State], step: int, steps: int, repaired: bool) -> nn.Module:
    """The network at a step of the line; REPAIR aims at moments that are interpolated too, ends repeated accordingly."""
    last = steps - 1
    if step in (0, last):
        return family.network(ends[step == last])
    model = family.mean(ends, [last - step, step])
    if not repaired:
        return model
    part = gcd(last - step, step)
    return family.repaired(model, [ends[0]] * ((last - step) // part) + [ends[1]] * (step // part))


def main() -> None:
    arguments = parser(__doc__, models=2)
    arguments.add_argument("--steps", type=int, default=9, help="networks on the line, both ends included")
    options = arguments.parse_args()
    family = read_family(options)
    raw, aligned = family.states[:2], family.aligned("c2m3")[:2]
    arms = {
        "naive": (raw, False),
        "naive, REPAIR": (raw, True),
        "c2m3": (aligned, False),
        "c2m3, REPAIR": (aligned, True),
    }
    results, rows = {}, []
    for name, (ends, repaired) in arms.items():
        scores = [family.score(between(family, ends, step, options.steps, repaired)) for step in range(options.steps)]
        accuracies, losses = ([score[part] for score in scores] for part in (0, 1))
        results[name] = {"barrier": barrier_height(losses), "losses": losses, "accuracies": accuracies}
        rows.append([name, results[name]["barrier"], min(accuracies)])
        print(f"{name}: barrier {rows[-1][1]:.3f}", flush=True)
    with canvas(options.folder / "curves.png", (6.5, 4.0)) as (_, axes):
        shares = [step / (options.steps - 1) for step in range(options.steps)]
        for index, (name, found) in enumerate(results.items()):
            axes.plot(shares, found["losses"], STYLES[index], marker=MARKS[index], markersize=4, label=name)
        axes.set_xlabel("share of the second network")
        axes.set_ylabel("test loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_results(options.folder / "curves.json", results)
    print(f"\n{options.folder}\n\n{table(['', 'loss barrier', 'lowest accuracy'], rows)}")


if __name__ == "__main__":
    main()
