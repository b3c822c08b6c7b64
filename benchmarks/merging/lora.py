"""Spectral merges of LoRA adapters: the core space of the factors against the dense updates, in one process.

    python benchmarks/merging/lora.py                    # Iso-C, 8 adapters of rank 16, layers of 4096 x 4096
    python benchmarks/merging/lora.py --methods iso_c tsv_m --rounds 3

Both sides read the same PEFT folders and merge the true updates `alpha / r * B @ A`. The dense side forms the matrices
and decomposes them with plain float32 SVDs, leaving out singular values that are rounding noise; it is what a full-rank
implementation does with an adapter. Ours gives factors, which are multiplied out, untimed, to compare the results.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from differences import dense_updates, differences
from environments import ROOT
from report import in_words, machine, write_json
from synthetic import Adapters, build
from torch import Tensor

from hf_atm.merging import merge_adapters


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets up to the numerical rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return left[:, :rank], values[:rank], right[:rank]


def dense_iso_c(updates: list[Tensor]) -> Tensor:
    left, values, right = svd(torch.stack(updates).sum(0))
    return left @ right * values.mean()


def dense_tsv_m(updates: list[Tensor]) -> Tensor:
    count = min(updates[0].shape) // len(updates)
    lefts, values, rights = zip(*map(svd, updates), strict=True)
    left = polar(torch.cat([part[:, :count] for part in lefts], dim=1))
    right = polar(torch.cat([part[:count] for part in rights]))
    return left * torch.cat([part[:count] for part in values]) @ right


def polar(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix)
    return left @ right


METHODS = {"iso_c": dense_iso_c, "tsv_m": dense_tsv_m}


def merge_dense(method: str, folders: list[Path]) -> dict[str, Tensor]:
    updates = [dense_updates(folder, torch.float32) for folder in folders]
    return {name: METHODS[method]([update[name] for update in updates]) for name in updates[0]}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def compare(method: str, folders: list[Path], work: Path, rounds: int) -> dict[str, Any]:
    """Seconds of both sides, in alternating order, and the difference of the last results."""
    seconds: dict[str, list[float]] = {"ours": [], "dense": []}
    results = {}
    sides = {
        "ours": lambda: merge_adapters(folders, method=method, output="cat"),
        "dense": lambda: merge_dense(method, folders),
    }
    for index in range(rounds):
        for side in list(sides)[:: -1 if index % 2 else 1]:
            results[side], elapsed = timed(sides[side])
            seconds[side].append(elapsed)
    results["ours"].save_pretrained(work / method)
    ours = dense_updates(work / method)
    pairs = ((name, ours[name], tensor.double()) for name, tensor in results["dense"].items())
    missing = sorted(set(ours) ^ set(results["dense"]))
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "seconds": seconds,
        "ratio_of_medians": medians["dense"] / medians["ours"],
        "difference": differences(pairs) | {"missing": missing},
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["iso_c"], choices=sorted(METHODS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=4096, help="rows and columns of a layer")
    parser.add_argument("--output", help="write all figures to this JSON file")
    options = parser.parse_args()
    data = Adapters(hidden=options.hidden, modules=1)
    result: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "methods": {}}
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as temporary:
        folders, tiny = (
            [build(what, Path(temporary) / name) / f"task{task}" for task in range(what.tasks)]
            for name, what in (("full", data), ("tiny", data.tiny()))
        )
        for method in options.methods:
            merge_adapters(tiny, method=method, output="cat")  # imports
            row = compare(method, folders, Path(temporary), options.rounds)
            result["methods"][method] = row
            ours, dense = (statistics.median(row["seconds"][side]) for side in ("ours", "dense"))
            print(
                f"{method}: {data.tasks} adapters of rank {data.rank}, one layer of {data.hidden} x {data.hidden}\n"
                f"  ours {ours:.3f} s, dense {dense:.2f} s, {row['ratio_of_medians']:.0f} times as long\n"
                f"  ours against dense: {in_words(row['difference'])}",
                flush=True,
            )
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
