"""From scores by seed to one table: mean, worst task, normalised to the experts, cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


#: An expert below this is at chance, and a ratio to it says nothing.
LEAST_EXPERT_SCORE = 0.05


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def normalized(scores: Mapping[str, float], experts: Mapping[str, float]) -> float | None:
    """Mean over tasks of score / expert's score; tasks whose expert is below `LEAST_EXPERT_SCORE` are left out."""
    ratios = [scores[task] / experts[task] for task in sorted(scores) if experts.get(task, 0.0) >= LEAST_EXPERT_SCORE]
    return statistics.fmean(ratios) if ratios else None


def summarize(cells: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures over seeds for every row of a comparison.

    Args:
        cells (`Mapping[int, Mapping[str, Mapping]]`): results of [`run_cell`] by seed and member.

    Returns:
        `dict[str, dict]`: by row name, `seeds` and, by seed, why others `failed`; for `validation` and `test`, `average`, `worst` and (with experts)
        `normalized` as mean and standard deviation, and `tasks`, each task's mean; `cost`, averaged over seeds.
    """
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for seed, members in sorted(cells.items()):
        for cell in members.values():
            for name, row in cell["rows"].items():
                rows.setdefault(name, {})[seed] = row
    reference = next((name for name in rows if name == "experts" or name.endswith(", experts")), "experts")
    experts = {seed: row for seed, row in rows.get(reference, {}).items() if "failed" not in row}
    return {name: _row(by_seed, experts) for name, by_seed in rows.items()}


def _row(by_seed: Mapping[int, Mapping[str, Any]], experts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    costs = [row["cost"] for row in by_seed.values()]
    failed = {seed: row["failed"] for seed, row in by_seed.items() if "failed" in row}
    by_seed = {seed: row for seed, row in by_seed.items() if seed not in failed}
    result: dict[str, Any] = {"seeds": sorted(by_seed), "failed": failed}
    for part in ("validation", "test"):
        scores = [row[part] for row in by_seed.values() if row.get(part)]
        if not scores:
            continue
        ratios = [
            normalized(row[part], experts[seed][part])
            for seed, row in by_seed.items()
            if seed in experts and row.get(part)
        ]
        result[part] = {
            "average": spread([statistics.fmean(s.values()) for s in scores]),
            "worst": spread([min(s.values()) for s in scores]),
            "tasks": {task: statistics.fmean(s[task] for s in scores) for task in sorted(scores[0])},
        }
        known = [ratio for ratio in ratios if ratio is not None]
        if known:
            result[part]["normalized"] = spread(known)
    result["cost"] = {
        name: statistics.fmean(cost[name] for cost in costs)
        for name in ("optimizer_steps", "examples", "seconds", "communicated_bytes", "searched_examples")
    }
    return result


def markdown_table(rows: Mapping[str, Mapping[str, Any]], part: str) -> str:
    """A Markdown table of one part, a line per row, best average first.

    Args:
        rows (`Mapping[str, Mapping]`): from [`summarize`].
        part (`str`): `"validation"` or `"test"`.
    """
    shown = {name: row for name, row in rows.items() if part in row}
    tasks = sorted({task for row in shown.values() for task in row[part]["tasks"]})
    heads = ["", "average", "worst task", "normalised", *tasks, "steps", "minutes", "MB moved", "examples searched"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, row in sorted(shown.items(), key=lambda item: -item[1][part]["average"]["mean"]):
        figures, cost = row[part], row["cost"]
        cells = [
            name,
            *(_cell(figures.get(key)) for key in ("average", "worst", "normalized")),
            *(f"{figures['tasks'][task]:.3f}" for task in tasks),
            f"{cost['optimizer_steps']:.0f}",
            f"{cost['seconds'] / 60:.1f}",
            f"{cost['communicated_bytes'] / 1e6:.0f}",
            f"{cost['searched_examples']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failures = [f"{name}, seed {seed}: {why}" for name, row in rows.items() for seed, why in row["failed"].items()]
    return "\n".join([*lines, *(f"\nFailed: {line}" for line in failures)])


def _cell(figure: Mapping[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['mean']:.3f} ± {figure['std']:.3f}"
