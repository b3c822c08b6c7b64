"""The quality benchmark: `hf-atm compare` on one of the suites beside this file.

    python benchmarks/quality/run.py text                    # all members, 200 steps per task, three seeds
    python benchmarks/quality/run.py vision --rounds 3       # 3 rounds of 20 steps: joint, plain mean, recommended
    python benchmarks/quality/run.py vision --members joint recommended --seeds 0

The text suites run under bfloat16 autocast, all members alike, which nearly halves their time where the processor computes
in it; elsewhere it would take 20 times as long, so they stay in float32 there. --precision decides otherwise.
Interrupt it at will: finished runs are kept, and the same command goes on. Everything after `--` goes to hf-atm compare.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


# As the command itself has it, before transformers is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import squeezenet  # noqa: F401  (registers the backbone of the vision suite)
import torch
import yaml

from hf_atm.cli.main import main


HERE = Path(__file__).parent
STEPS_PER_ROUND = 20
SHORT = ["joint", "joint, faster heads", "mean, 10 x 20", "recommended"]


def short_members(suite: str) -> list[str]:
    """What a run of few rounds compares: those of `SHORT` that the suite has."""
    known = yaml.safe_load((HERE / f"{suite}.yaml").read_text(encoding="utf-8"))["compare"]["members"]
    return [member for member in SHORT if member in known]


def has_bfloat16() -> bool:
    """Whether matrices of bfloat16 are multiplied in hardware here."""
    if torch.accelerator.is_available():
        return True
    processor = torch.cpu.get_capabilities()
    return any(processor.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(path.stem for path in HERE.glob("*.yaml")))
    parser.add_argument("--rounds", type=int, default=10, help="rounds of 20 steps (default: %(default)s)")
    parser.add_argument("--members", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--output", help="default: runs/quality/SUITE-ROUNDS")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="of the text suites")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    options, rest = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    members = options.members or (None if options.rounds == 10 else short_members(options.suite))
    arguments = ["compare", str(HERE / f"{options.suite}.yaml"), "--seeds", *map(str, options.seeds)]
    arguments += ["--steps", str(options.rounds * STEPS_PER_ROUND), "--num_rounds", str(options.rounds)]
    arguments += ["--output_dir", options.output or f"runs/quality/{options.suite}-{options.rounds}"]
    if options.suite.startswith("text"):
        precision = options.precision or ("bf16" if has_bfloat16() else "fp32")
        # The Trainer takes bfloat16 on a processor only when told that it is one.
        use_cpu = not torch.accelerator.is_available()
        arguments += ["--bf16", str(precision == "bf16").lower(), "--use_cpu", str(use_cpu).lower()]
    if members:
        arguments += ["--members", *members]
    sys.exit(main([*arguments, "--quiet", *(argument for argument in rest if argument != "--")]))
