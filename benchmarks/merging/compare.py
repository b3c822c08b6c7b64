"""This library against mergekit, FusionBench, PEFT, plain decompositions and the floor, as whole processes.

    python benchmarks/merging/compare.py                                 # every case, three rounds; hours
    python benchmarks/merging/compare.py llama-task_arithmetic bert-ties # some cases
    python benchmarks/merging/compare.py 'llama-*' --rounds 5 --arms ours mergekit floor
    python benchmarks/merging/compare.py --list

All arms of a case merge the same files, one process after the other, in alternating order from round to round; the
files are in the page cache and unwritten pages are flushed before each. Each peer lives in a virtual environment of its
own below `runs/benchmarks/environments`, installed when first needed. A peer that cannot be installed or fails is
reported as such. Memory is the process tree's, without file-backed pages. Nothing reaches the network but pip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from arms import Commands
from cases import Case, all_cases, size
from differences import compare_adapters, compare_models
from environments import ROOT, last_line
from measure import Run, run
from report import machine, print_case, summary, write_json
from synthetic import Adapters, build, digest


def run_arm(case: Case, arm: str, command: list[str], data: Path, work: Path) -> Run | str:
    """One process of one arm; its result is left in `work/arm`. Returns why it failed, if it did."""
    recipe, output, log = work / f"{arm}.yaml", work / arm, work / f"{arm}.log"
    recipe.write_text(yaml.safe_dump(case.recipe(arm, data), sort_keys=False), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    done = run([*command, str(recipe), str(output)], log, environment)
    return last_line(log.read_text(encoding="utf-8", errors="replace")) if done.returncode else done


def warm_cache(folder: Path) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def run_case(name: str, case: Case, commands: Commands, folder: Path, rounds: int, arms: list[str]) -> dict[str, Any]:
    """All rounds of one case: figures by arm, and the difference of its result from ours."""
    data, tiny = (build(what, folder / "data" / digest(what)) for what in (case.data, case.data.tiny()))
    work = folder / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    failed = {arm: reason for arm, reason in commands.missing.items() if arm in arms}
    runs: dict[str, list[Run]] = {}
    for arm in arms:
        # An untimed run on small files compiles what Python compiles once, and finds out whether the arm works.
        if arm not in failed and isinstance(outcome := run_arm(case, arm, commands.commands[arm], tiny, work), str):
            failed[arm] = outcome
    for index in range(rounds):
        warm_cache(data)
        for arm in arms[:: -1 if index % 2 else 1]:
            if arm in failed or (case.arms[arm].once and arm in runs):
                continue
            outcome = run_arm(case, arm, commands.commands[arm], data, work)
            if isinstance(outcome, str):
                failed[arm] = outcome
            else:
                runs.setdefault(arm, []).append(outcome)
    figures: dict[str, Any] = {}
    for arm in arms:
        figures[arm] = {"failed": failed[arm]} if arm in failed else summary(runs[arm])
        if arm != "ours" and not {arm, "ours"} & set(failed) and "ours" in arms:
            figures[arm]["difference"] = difference(case, work / "ours", work / arm, data)
    shutil.rmtree(work)
    return figures


def difference(case: Case, ours: Path, theirs: Path, data: Path) -> dict[str, Any]:
    if isinstance(case.data, Adapters):
        return compare_adapters(ours, theirs)
    return compare_models(ours, theirs, data / "base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names or patterns of cases; all by default")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--arms", nargs="+", help="only these arms of each case")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every arm, in alternating order")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers and of the vocabulary")
    parser.add_argument(
        "--folder", type=Path, help="keep models here and use them again; a temporary folder otherwise"
    )
    parser.add_argument("--environments", type=Path, default=ROOT / "runs" / "benchmarks" / "environments")
    parser.add_argument("--output", help="write all figures to this JSON file")
    options = parser.parse_args()
    cases = {
        name: case
        for name, case in all_cases(options.scale).items()
        if not options.cases or any(fnmatchcase(name, pattern) for pattern in options.cases)
    }
    if options.list or not cases:
        print("\n".join(f"{name:<24}{', '.join(case.arms)}" for name, case in all_cases(options.scale).items()))
        return
    wanted = {name: [arm for arm in case.arms if arm in (options.arms or case.arms)] for name, case in cases.items()}
    commands = Commands(sorted({arm for arms in wanted.values() for arm in arms}), options.environments)
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": commands.versions,
        "rounds": options.rounds,
        "cases": {},
    }
    runs_folder = ROOT / "runs"
    runs_folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs_folder) as temporary:
        folder = options.folder or Path(temporary)
        for name, case in cases.items():
            figures = run_case(name, case, commands, folder, options.rounds, wanted[name])
            print_case(name, size(case.data), case.note, figures)
            result["cases"][name] = {"size": size(case.data), "seed": case.data.seed, "arms": figures}
            if options.output:
                write_json(options.output, result)


if __name__ == "__main__":
    main()
