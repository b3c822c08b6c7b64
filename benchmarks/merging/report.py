"""What a comparison found, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import Run


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians and all runs of one arm; the peak is the largest of all."""
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "processor_seconds": statistics.median(run.processor_seconds for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def print_case(name: str, size: str, note: str, arms: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}: {size}\n  {note}")
    print(
        f"  {'':<14}{'seconds':>9}{'/ ours':>8}{'range':>16}{'processor':>11}{'/ ours':>8}{'peak MiB':>10}{'/ ours':>8}"
    )
    ours = arms.get("ours", {})
    for arm, row in arms.items():
        if "failed" in row:
            print(f"  {arm:<14}failed: {row['failed']}")
            continue
        times = [run["seconds"] for run in row["runs"]]
        print(
            f"  {arm:<14}{row['seconds']:>9.2f}{ratio(row, ours, 'seconds'):>8}"
            f"{f'{min(times):.2f}-{max(times):.2f}':>16}"
            f"{row['processor_seconds']:>11.2f}{ratio(row, ours, 'processor_seconds'):>8}"
            f"{row['peak_bytes'] / 2**20:>10.0f}{ratio(row, ours, 'peak_bytes'):>8}"
        )
    for arm, row in arms.items():
        if "difference" in row:
            print(f"  ours against {arm}: {in_words(row['difference'])}")


def ratio(row: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    return f"{row[key] / ours[key]:.2f}" if key in ours else ""


def in_words(difference: dict[str, Any]) -> str:
    worst = f" ({difference['worst']})" if difference["worst"] else ""
    words = (
        f"{100 * difference['equal']:.3f} % of entries equal, largest difference {difference['max_abs']:.2e}, at most "
        f"{difference['relative']:.2e} of a tensor's merged task vector{worst}, norms {difference['norm_ratio']:.6f} to 1"
    )
    missing = difference["missing"]
    return words + (f"; only one of the two has {', '.join(missing[:3])}, {len(missing)} in all" if missing else "")


def machine() -> dict[str, Any]:
    """Processor and cores; nothing that names the machine."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": model, "cores": len(os.sched_getaffinity(0))}


def write_json(path: str, result: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
