"""What a tensor costs beside its arithmetic: checkpoints of 1,000, 4,000 and 16,000 tensors of at most 64 x 64.

    python benchmarks/merging/overhead.py
    python benchmarks/merging/overhead.py --tensors 1000 4000 --arms ours floor mergekit

Overhead is the time beyond the floor, which reads and writes the same files tensor by tensor and imports torch too.
Where it is linear, the cost of one more tensor is the same between any two sizes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from arms import Commands
from cases import Arm, Case, size
from compare import run_case
from environments import ROOT
from report import machine, print_case, write_json
from synthetic import CHECKPOINTS, shapes_of


ARMS = ("ours", "floor", "mergekit")


def case_of(tensors: int, arms: list[str]) -> Case:
    """Task arithmetic over about so many small tensors."""
    small = CHECKPOINTS["small"]
    one, two = (len(shapes_of(replace(small, layers=layers))) for layers in (1, 2))
    data = replace(small, layers=max(1, round((tensors - one) / (two - one)) + 1))
    same = Arm("task_arithmetic")
    return Case(data, 0.3, {arm: same for arm in arms}, data.dtype, "The same sum.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--arms", nargs="+", default=["ours", "floor"], choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=ROOT / "runs" / "benchmarks" / "environments")
    parser.add_argument("--output", help="write all figures to this JSON file")
    options = parser.parse_args()
    commands = Commands(options.arms, options.environments)
    result: dict[str, Any] = {"machine": machine(), "versions": commands.versions, "cases": {}}
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as temporary:
        for tensors in sorted(options.tensors):
            case = case_of(tensors, options.arms)
            figures = run_case(str(tensors), case, commands, Path(temporary), options.rounds, options.arms)
            print_case(f"{tensors} tensors", size(case.data), case.note, figures)
            result["cases"][tensors] = {"size": size(case.data), "arms": figures}
    print("\nMilliseconds per further tensor")
    for arm in options.arms:
        print(f"  {arm:<14}" + "".join(f"{words:>24}" for words in per_tensor(arm, result["cases"])))
    if options.output:
        write_json(options.output, result)


def per_tensor(arm: str, cases: dict[int, dict[str, Any]]) -> list[str]:
    """Slope of the median time between neighbouring sizes, in words."""
    seconds = {tensors: case["arms"][arm].get("seconds") for tensors, case in cases.items()}
    return [
        f"{1000 * (seconds[more] - seconds[fewer]) / (more - fewer):.2f} ({fewer} to {more})"
        for fewer, more in pairwise(seconds)
        if seconds[fewer] is not None and seconds[more] is not None
    ]


if __name__ == "__main__":
    main()
