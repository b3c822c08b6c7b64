"""Post-hoc ATM after one-shot merges: `hf-atm train` for one long round, then `hf-atm refine` with a tenth of the data.

    python benchmarks/quality/refine.py vision
    python benchmarks/quality/refine.py text --seeds 0

Experts are tuned for 200 steps per task; the scale of their one merge is searched on validation data. Finished parts are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import squeezenet  # noqa: F401  (registers the backbone of the vision suite)
import torch

from hf_atm.cli.main import main


HERE = Path(__file__).parent
MERGES = {"ties": {"density": 0.2}, "tsv_m": {"flatten_conv": True}}
STEPS = 200
LEARNING_RATES = {"text": ("2e-4", "2e-4"), "vision": ("5e-4", "3e-4")}


def run(arguments: list[str]) -> None:
    """A command of hf-atm, which has to succeed."""
    code = main([*arguments, "--quiet"])
    if code:
        sys.exit(code)


def refine(suite: str, method: str, seed: int, rounds: int, steps: int, share: float) -> dict:
    """One merge and its refinement; what `refine.json` says, with test scores before."""
    config, folder = str(HERE / f"{suite}.yaml"), Path("runs", "quality", f"refine-{suite}", f"{method}-{seed}")
    merged, refined = folder / "merged", folder / "refined"
    expert_rate, rate = LEARNING_RATES[suite]
    common = ["--seed", str(seed), "--save_strategy", "no"]
    if not (merged / "test_metrics.json").is_file():
        one_round = ["--num_rounds", "1", "--local_steps", str(STEPS), "--merge_method", method]
        one_round += ["--merge_kwargs", json.dumps(MERGES[method]), "--outer_learning_rate", "search"]
        one_round += ["--learning_rate", expert_rate, "--lr_scheduler_type", "linear"]
        run(["train", config, "--output_dir", str(merged), *one_round, *common])
    if not (refined / "refine.json").is_file():
        settings = ["--num_rounds", str(rounds), "--local_steps", str(steps), "--learning_rate", rate]
        settings += ["--outer_learning_rate", "norm", "--moment_exponent", "1.0", "--head_steps", "0.25"]
        settings += ["--lr_scheduler_type", "linear", "--lr_schedule_scope", "run"]
        settings += ["--optimizer_policy", "per_task", "--seed", str(seed)]
        command = ["refine", str(merged), config, "--data", "train", "--share", str(share)]
        run([*command, "--output_dir", str(refined), *settings])
    before = json.loads((merged / "test_metrics.json").read_text())
    return {**json.loads((refined / "refine.json").read_text()), "test_before": before}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of refinement (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps per task and round (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.1, help="share of the training data (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| merge | seed | validation before | best round | validation after | test before | test after |")
    print("|---|---|---|---|---|---|---|")
    for method in MERGES:
        gains = []
        for seed in options.seeds:
            facts = refine(options.suite, method, seed, options.rounds, options.steps, options.share)
            tests = [facts[key]["test_average"] for key in ("test_before", "test")]
            gains.append(tests[1] - tests[0])
            cells = [
                method,
                seed,
                f"{facts['start']['eval_average']:.3f}",
                facts["best_round"],
                f"{facts['best']:.3f}",
            ]
            print("| " + " | ".join(map(str, [*cells, *(f"{score:.3f}" for score in tests)])) + " |", flush=True)
        print(f"| {method} | mean gain on test | | | | | {statistics.fmean(gains):+.3f} |", flush=True)
