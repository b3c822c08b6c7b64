"""What the loop costs beside the plain Trainer: time and memory, same model, data and number of steps.

    python benchmarks/overhead.py            # ratio of median times at 4 and 16 tasks, and extra memory
    python benchmarks/overhead.py --pairs 9  # more alternating pairs, for a noisy machine

Both arms read the same examples in the same order through the same multi-task model; one is ATMTrainer, the other
transformers' Trainer. Runs alternate within pairs, since timings drift; processor time is given beside wall time, for a
machine that does other work. Memory is the difference of the peak resident sizes of two fresh processes, in copies of
the shared weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import datasets
import torch
import transformers
from transformers import BertConfig, BertModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

import hf_atm
from hf_atm import ATMConfig, ATMTrainer, MultiTaskModel


SIZES = {
    # hidden size, layers, vocabulary: small enough to repeat, large enough that steps are real work
    "time": (128, 4, 2000),
    # 25 million parameters: one copy is 100 MB, well above the noise of a process's size
    "memory": (384, 8, 28000),
}
BATCH, LENGTH = 16, 64


def build(kind: str, tasks: list[str]) -> MultiTaskModel:
    hidden, layers, vocabulary = SIZES[kind]
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
    )
    torch.manual_seed(0)
    return MultiTaskModel.from_backbone(BertModel(config), {task: {"num_labels": 2} for task in tasks}, seed=0)


def examples(kind: str, tasks: list[str], steps: int) -> dict[str, datasets.Dataset]:
    data = {}
    for index, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, SIZES[kind][2], (steps * BATCH, LENGTH), generator=generator)
        data[task] = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    return data


def settings(folder: str, steps_per_log: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": steps_per_log,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def run_loop(
    kind: str, tasks: list[str], data: dict[str, datasets.Dataset], rounds: int, steps: int
) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        args = ATMConfig(num_rounds=rounds, round_table=False, **settings(folder, steps))
        trainer = ATMTrainer(build(kind, tasks), args, train_dataset=data, data_collator=collate)
        return timed(trainer, rounds * steps * len(tasks))


def run_plain(
    kind: str, tasks: list[str], data: dict[str, datasets.Dataset], rounds: int, steps: int
) -> tuple[float, float]:
    rows = datasets.concatenate_datasets([data[task].add_column("task", [task] * len(data[task])) for task in tasks])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(num_train_epochs=rounds, **settings(folder, steps))
        trainer = Trainer(build(kind, tasks), args, train_dataset=rows, data_collator=collate)
        return timed(trainer, rounds * steps * len(tasks))


def collate(rows: list[dict]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | ({"task": rows[0]["task"]} if "task" in rows[0] else {})


def timed(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Seconds of wall time and of processor time that `train()` took."""
    trainer.remove_callback(PrinterCallback)
    started, busy = time.perf_counter(), time.process_time()
    trainer.train()
    seconds = time.perf_counter() - started, time.process_time() - busy
    assert trainer.state.global_step == steps, (trainer.state.global_step, steps)
    return seconds


def measure_time(count: int, pairs: int, steps: int) -> dict[str, Any]:
    tasks = [f"task{index:02d}" for index in range(count)]
    data = examples("time", tasks, steps)
    rounds = 2 if count <= 4 else 1
    run_loop("time", tasks[:1], {tasks[0]: data[tasks[0]]}, 1, steps)  # warm up
    loop, plain = [], []
    for pair in range(pairs):
        for arm in ("loop", "plain") if pair % 2 else ("plain", "loop"):
            (loop if arm == "loop" else plain).append(
                (run_loop if arm == "loop" else run_plain)("time", tasks, data, rounds, steps)
            )
    return {
        "tasks": count,
        "rounds": rounds,
        "steps_per_segment": steps,
        **{
            clock: {
                "loop_seconds": [run[index] for run in loop],
                "plain_seconds": [run[index] for run in plain],
                "ratio_of_medians": median(loop, index) / median(plain, index),
            }
            for index, clock in enumerate(("wall", "processor"))
        },
    }


def median(runs: list[tuple[float, float]], index: int) -> float:
    return statistics.median(run[index] for run in runs)


def measure_memory(count: int) -> dict[str, Any]:
    peaks = {}
    for arm in ("loop", "plain"):
        command = [sys.executable, os.path.abspath(__file__), "--peak", arm, "--tasks", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[arm] = json.loads(done.stdout.splitlines()[-1])
    extra = peaks["loop"]["peak"] - peaks["plain"]["peak"]
    return {"tasks": count, "copies_of_shared_weights": extra / peaks["loop"]["shared"], **peaks}


def print_peak(arm: str, count: int) -> None:
    tasks = [f"task{index:02d}" for index in range(count)]
    data = examples("memory", tasks, 1)
    (run_loop if arm == "loop" else run_plain)("memory", tasks, data, 2, 1)
    shared = 4 * sum(p.numel() for p in build("memory", tasks).backbone.parameters())
    unit = 1 if platform.system() == "Darwin" else 1024
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "shared": shared}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs per number of tasks")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per segment")
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 16], help="numbers of tasks")
    parser.add_argument("--output", help="write all figures to this JSON file")
    parser.add_argument("--peak", choices=("loop", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.peak:
        print_peak(options.peak, options.tasks[0])
        return
    result: dict[str, Any] = {
        "versions": {
            "hf_atm": hf_atm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "time": [measure_time(count, options.pairs, options.steps) for count in options.tasks],
        "memory": [measure_memory(count) for count in options.tasks],
    }
    for row in result["time"]:
        for clock in ("wall", "processor"):
            figures = row[clock]
            print(
                f"{row['tasks']:>3} tasks  {clock:<9}  loop {statistics.median(figures['loop_seconds']):7.2f} s  "
                f"plain {statistics.median(figures['plain_seconds']):7.2f} s  ratio {figures['ratio_of_medians']:.3f}"
            )
    for row in result["memory"]:
        print(
            f"{row['tasks']:>3} tasks  extra memory {row['copies_of_shared_weights']:.2f} copies of the shared weights"
        )
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
