"""Sets of graphs as tasks of one encoder: ATM and joint training beside tuning on each set alone.

    python benchmarks/fewshot/atm_graphs.py                               # letter_high, triangles, enzymes; three seeds
    python benchmarks/fewshot/atm_graphs.py --arms fedavg --seeds 0          # one cell; cells are independent

Each set's task is its base classes, learned from episodes with a prototypical head; the encoder is tested on episodes of
the novel classes. All arms take the same number of episodes of each set at the same rates, through encoders of one shape:
a node is its one-hot degree, as wide as the sets together need. Interrupt it at will: finished cells are kept as JSON in
--output, and the same command goes on or prints the table. Needs the extra hf-atm[graphs].
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback

from hf_atm import ATMConfig, ATMTrainer, PrototypicalTaskHead
from hf_atm.baselines.joint import JointTrainer
from hf_atm.baselines.presets import get_baseline
from hf_atm.fewshot import FewShotModel, GINEncoder, GraphSet, NodeFeatures, evaluate_episodes, load_graph_set
from hf_atm.seeding import derive_seed, isolated_rng


WAYS = {"letter_high": 4, "triangles": 3, "enzymes": 2, "reddit": 4}
SHOT, QUERY = 10, 15
ENCODER: dict[str, Any] = {"hidden_size": 64, "num_layers": 3, "pooling": "mean", "dropout": 0.5}
SCHEDULE = {"lr_scheduler_type": "linear", "lr_schedule_scope": "run"}
# Of the merging ones by the name of the baseline whose settings they have.
ARMS = ("recommended", "fedavg", "joint", "alone", "untrained")


class GraphTasks(nn.Module):
    """A shared encoder with a prototypical head per set of graphs."""

    def __init__(self, encoder: GINEncoder, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {
                task: PrototypicalTaskHead(encoder.embedding_dim, count, WAYS[task], SHOT, QUERY)
                for task, count in classes.items()
            }
        )

    def forward(self, task: str, episodes: torch.Tensor | None = None, **graphs: torch.Tensor) -> Any:
        return self.heads[task](self.encoder(graphs), episodes)


class GraphRows(Dataset):
    """A set's training graphs by row; they are put side by side when a batch is made."""

    def __init__(self, data: GraphSet) -> None:
        self.labels = np.searchsorted(data.base, data.train.labels)
        self.collate = lambda rows: data.train.batch([row["row"] for row in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"row": row}


def run_cell(arm: str, tasks: list[str], seed: int, sets: Mapping[str, GraphSet], options: Any) -> dict[str, Any]:
    """Accuracy on novel classes by set of one arm with one seed, the encoder trained on `tasks`."""
    data = {task: GraphRows(sets[task]) for task in tasks}
    with isolated_rng(derive_seed("encoder", seed)):
        encoder = GINEncoder(sets[tasks[0]].train.features.size, **ENCODER)
    started = time.perf_counter()
    if arm != "untrained":
        baseline = get_baseline(arm if arm == "fedavg" else "recommended")
        # Without classifiers there is nothing to settle after a merge.
        settings = {**SCHEDULE, **baseline.settings(tasks), "head_steps": 0}
        model = GraphTasks(encoder, {task: len(sets[task].base) for task in tasks})
        with tempfile.TemporaryDirectory() as scratch:
            args = ATMConfig(
                scratch,
                seed=seed,
                num_rounds=options.rounds,
                local_steps=options.local_steps,
                learning_rate=options.learning_rate,
                per_device_train_batch_size=options.episodes_per_step,
                max_grad_norm=10.0,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                round_table=False,
                dataloader_pin_memory=False,
                dataloader_drop_last=False,
                **settings,
            )
            trainer_class = JointTrainer if arm == "joint" else ATMTrainer
            collators = {task: rows.collate for task, rows in data.items()}
            trainer = trainer_class(model, args, train_dataset=data, data_collator=collators)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    embedder = FewShotModel.from_encoder(encoder, scale=1.0).eval()
    scores = {}
    for task in tasks:
        common = (WAYS[task], SHOT, QUERY, options.test_episodes, sets[task].novel, 0)
        scores[task] = evaluate_episodes(embedder, sets[task].test, *common)
    return {"scores": scores, "seconds": time.perf_counter() - started}


def table(results: Mapping[str, Mapping[str, list[dict[str, float]]]], sets: list[str]) -> str:
    """Mean accuracy on novel classes, half the interval over episodes, and in brackets the deviation over seeds."""
    lines = [f"| | {' | '.join(sets)} |", "|---|" + "---|" * len(sets)]
    for arm, by_set in results.items():
        shown = []
        for name in sets:
            scores = [cell["accuracy"] for cell in by_set[name]]
            text = f"{statistics.fmean(scores):.3f} ± {statistics.fmean(cell['ci95'] for cell in by_set[name]):.3f}"
            shown.append(text + (f" ({statistics.stdev(scores):.3f})" if len(scores) > 1 else ""))
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/graphs"), help="default: %(default)s")
    parser.add_argument("--sets", nargs="+", choices=sorted(WAYS), default=["letter_high", "triangles", "enzymes"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--local-steps", type=int, default=25, help="per set and round (default: %(default)s)")
    parser.add_argument("--episodes-per-step", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--test-episodes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/atm_graphs"), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("rounds", "local_steps", "episodes_per_step", "learning_rate", "test_episodes")
    kept = Cells(options.output, {"encoder": ENCODER, **{name: getattr(options, name) for name in names}})
    width = max(load_graph_set(options.data / name, "degree").train.features.size for name in options.sets)
    sets = {name: load_graph_set(options.data / name, NodeFeatures("degree", width)) for name in options.sets}
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in options.seeds:
        for arm in options.arms:
            for tasks in [[name] for name in sets] if arm == "alone" else [list(sets)]:
                cell = kept.result(
                    f"{arm}-{'-'.join(tasks)}-{seed}",
                    lambda arm=arm, tasks=tasks, seed=seed: run_cell(arm, tasks, seed, sets, options),
                    width=width,
                )
                for name, scores in cell["scores"].items():
                    results.setdefault(arm, {}).setdefault(name, []).append(scores)
                shown = ", ".join(f"{name} {scores['accuracy']:.3f}" for name, scores in cell["scores"].items())
                print(f"{arm}, seed {seed}: {shown} in {cell['seconds']:.0f} s", flush=True)
    print("\n" + table(results, options.sets))


if __name__ == "__main__":
    main()
