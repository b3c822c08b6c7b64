"""The recommended settings on tasks that had no part in finding them: five of scikit-learn's images, no download needed.

    python benchmarks/quality/scikit_learn.py

Tasks and pretrained ViT are those of `hf-atm demo`: 200 optimizer steps of 32 images per task, three seeds, scores on its test
part. The learning rate is chosen per method on a fifth of the training part, with seed 0.
"""

from __future__ import annotations

import argparse
import os
import tempfile


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback

from hf_atm import ATMConfig, MultiTaskModel
from hf_atm.baselines import Suite, compare, parse_members
from hf_atm.cli.console import calm_libraries
from hf_atm.cli.demo import pretrain_backbone, to_examples
from hf_atm.cli.demo_data import LABELS, build_data
from hf_atm.metrics import build_compute_metrics


LINEAR, CONSTANT = {"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant"}
METHODS = {
    "joint": {"baseline": "joint", **LINEAR},
    "joint, faster heads": {"baseline": "joint", "head_learning_rate_ratio": 10.0, **LINEAR},
    "mean": {"baseline": "atm", **CONSTANT},
    "recommended": {"baseline": "recommended"},
}
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)


def build_suite(scratch: str, rounds: int) -> Suite:
    """The demo's backbone and tasks."""
    base, train, test = build_data(0)
    with tqdm(disable=True) as bar:
        backbone = pretrain_backbone(to_examples(base), 0, bar, scratch)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}

    def build(seed: int) -> MultiTaskModel:
        backbone.load_state_dict(state)
        heads = {task: {"num_labels": len(names)} for task, names in LABELS.items()}
        return MultiTaskModel.from_backbone(backbone, tasks=heads, seed=seed)

    examples = {task: to_examples(data) for task, data in train.items()}
    args = ATMConfig(
        scratch,
        num_rounds=rounds,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=500,
        save_strategy="no",
        logging_strategy="no",
        round_table=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    )
    return Suite(
        build_model=build,
        train={task: rows[: len(rows) * 4 // 5] for task, rows in examples.items()},
        validation={task: rows[len(rows) * 4 // 5 :] for task, rows in examples.items()},
        test={task: to_examples(data) for task, data in test.items()},
        args=args,
        prepare=lambda trainer: trainer.remove_callback(PrinterCallback),
        trainer_kwargs={"compute_metrics": build_compute_metrics(["accuracy"])},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of 20 steps (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calm_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        suite = build_suite(scratch, options.rounds)
        output, steps = f"runs/quality/scikit-learn-{options.rounds}", options.rounds * 20
        rates = {f"{m} at {r:g}": {**s, "learning_rate": r} for m, s in METHODS.items() for r in RATES}
        tried = compare(suite, parse_members(rates), [0], steps, f"{output}/rates", print)["rows"]
        best = {m: max(RATES, key=lambda r: tried[f"{m} at {r:g}"]["validation"]["average"]["mean"]) for m in METHODS}
        chosen = {m: {**METHODS[m], "learning_rate": rate} for m, rate in best.items()}
        print("chosen:", best)
        compare(suite, parse_members(chosen), options.seeds, steps, output, print)
    print(f"{output}/comparison.md")
