"""One merge of individual experts, by several methods and at several scales, inside a single round of ATM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ..callbacks import ATMCallback
from ..merging import check_merge_kwargs, merge_task_vectors, norm_scale
from ..merging.task_vectors import euclidean_norm


#: Factors on the norm-restoring scale among which validation data choose.
SCALES = (0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0)


@dataclass(frozen=True)
class OneShotMethod:
    """A merge method with the settings its authors recommend.

    Args:
        method (`str`): a registered merge method.
        kwargs (`dict`): its parameters.
        scale (`float`): the usual scaling coefficient, "untuned".
    """

    method: str
    kwargs: Mapping[str, Any]
    scale: float


METHODS: Mapping[str, OneShotMethod] = {
    "mean": OneShotMethod("mean", {}, 1.0),
    "task_arithmetic": OneShotMethod("task_arithmetic", {}, 0.3),
    "ties": OneShotMethod("ties", {"density": 0.2}, 1.0),
    "dare": OneShotMethod("dare", {"density": 0.1}, 1.0),
    "breadcrumbs": OneShotMethod("breadcrumbs", {"density": 0.1, "gamma": 0.01}, 1.0),
    "consensus": OneShotMethod("consensus", {}, 0.3),
    # A convolutional net is all kernels, on which these methods would otherwise be the mean.
    "tsv_m": OneShotMethod("tsv_m", {"flatten_conv": True}, 1.0),
    "iso_c": OneShotMethod("iso_c", {"flatten_conv": True}, 1.0),
}


def check_methods(names: Sequence[str]) -> list[str]:
    """The names, if all of them are in `METHODS`.

    Raises:
        KeyError: listing the known ones.
    """
    for name in names:
        if name not in METHODS:
            raise KeyError(f"There is no one-shot merge {name!r}; there are {', '.join(METHODS)}.")
        check_merge_kwargs(METHODS[name].method, METHODS[name].kwargs)
    return list(names)


class OneShotMerges(ATMCallback):
    """Scores every expert, and before the round's own merge that of each method, untuned and tuned.

    For a run of one round with `keep_task_vectors=True`. Private parts (heads) are those of the experts in every row.

    Args:
        trainer ([`ATMTrainer`]): the run's trainer.
        methods (`Sequence[str]`): names in `METHODS`.
        test_sets (`Mapping[str, Dataset]`, *optional*): scored too, at the chosen scales.

    Attributes:
        rows (`dict[str, dict]`): per row (`experts`, `<method> untuned`, `<method> tuned`) scores by task under
            `validation` and `test`, `scale`, and what it cost beside the experts: `searched`, the examples evaluated to
            choose the scale, and seconds of `merging` and `searching`.
    """

    def __init__(self, trainer: Any, methods: Sequence[str], test_sets: Mapping[str, Any] | None = None) -> None:
        self.trainer = trainer
        self.methods = check_methods(methods)
        self.sets = {"validation": trainer.eval_dataset, "test": dict(test_sets or {})}
        self.rows: dict[str, dict[str, Any]] = {
            "experts": {"validation": {}, "test": {}, "searched": 0, "merging": 0.0, "searching": 0.0}
        }

    def _scores(self, part: str, tasks: Sequence[str]) -> dict[str, float]:
        sets = {task: self.sets[part][task] for task in tasks if task in self.sets[part]}
        return self.trainer.quiet_scores(sets)

    def on_task_end(self, args, state, control, *, round, task, **kwargs):
        seconds, started = self.trainer.atm.seconds, perf_counter()
        evaluating = seconds["evaluating"]
        for part in self.sets:
            self.rows["experts"][part] |= self._scores(part, [task])
        if task == self.trainer.atm.plan.tasks[-1]:
            self._merge_all()
        # All this is in the rows' own books, and no part of the round.
        seconds["evaluating"] = evaluating
        seconds["merging"] -= perf_counter() - started

    def _merge_all(self) -> None:
        rounds = self.trainer.atm.rounds
        live = rounds.space.snapshot()
        statistics = {name: buffer.clone() for name, buffer in rounds.statistics.items()}
        if rounds.statistics:
            rounds.pool_statistics()
        for name in self.methods:
            self._merge(METHODS[name], name)
        rounds.space.restore(live)
        for name, buffer in rounds.statistics.items():
            buffer.copy_(statistics[name])

    def _merge(self, method: OneShotMethod, name: str) -> None:
        rounds = self.trainer.atm.rounds
        tasks = rounds.tasks
        started = perf_counter()
        vectors = [rounds.vectors[task] for task in tasks]
        move = merge_task_vectors(vectors, method.method, names=tasks, **method.kwargs)
        unit = norm_scale([rounds.norms[task] for task in tasks], euclidean_norm(move))
        merging, started = perf_counter() - started, perf_counter()
        averages: dict[float, float] = {}
        for scale in (method.scale, *(unit * factor for factor in SCALES)):
            with rounds.space.probe(rounds.base, move, scale):
                scores = self._scores("validation", tasks)
            average = sum(scores.values()) / len(scores)
            averages[scale] = average if math.isfinite(average) else -math.inf
        best = max(averages, key=lambda scale: averages[scale])
        searching = perf_counter() - started
        examples = sum(len(self.sets["validation"][task]) for task in tasks)
        for label, scale, searched, seconds in (
            ("untuned", method.scale, 0, 0.0),
            ("tuned", best, len(averages) * examples, searching),
        ):
            with rounds.space.probe(rounds.base, move, scale):
                row: dict[str, Any] = {part: self._scores(part, tasks) for part in self.sets}
            costs = {"searched": searched, "merging": merging, "searching": seconds}
            self.rows[f"{name} {label}"] = {**row, "scale": scale, **costs}
