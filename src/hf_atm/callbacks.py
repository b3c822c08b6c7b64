"""Events of the loop for users, and the callback that drives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from .loop import ATMLoop
    from .merge_report import MergeReport


class ATMCallback(TrainerCallback):
    """A [`~transformers.TrainerCallback`] that also hears about rounds and tasks.

    Order of a round: `on_round_begin`, then `on_task_begin` and `on_task_end` for each task, `on_round_end`, and after
    it the Trainer's own `on_log`, `on_epoch_end`, `on_evaluate` and `on_save`. Events fire on every process. A run
    resumed inside a segment does not repeat the begin events. `kwargs` hold `model`, `optimizer`, `lr_scheduler`,
    `processing_class`, `train_dataloader` and `eval_dataloader`. An event may change `control` or return another one.
    """

    def on_round_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, round: int, **kwargs: Any
    ) -> TrainerControl | None:
        """Before the first step of a round; the model holds the merged weights."""

    def on_task_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        round: int,
        task: str,
        **kwargs: Any,
    ) -> TrainerControl | None:
        """Before the first step of a task; the model holds the round's base."""

    def on_task_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        round: int,
        task: str,
        task_vector_norm: float,
        **kwargs: Any,
    ) -> TrainerControl | None:
        """After the last step of a task; the model still holds the tuned weights."""

    def on_round_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        round: int,
        report: MergeReport,
        **kwargs: Any,
    ) -> TrainerControl | None:
        """After the merge; the model holds the new base."""


class RoundCallback(TrainerCallback):
    """Drives the loop from inside the Trainer. Stands first in the list, so that logging, evaluation and saving at a
    round's end all see merged weights."""

    def __init__(self, loop: ATMLoop) -> None:
        self.loop = loop

    def on_train_begin(self, args, state, control, **kwargs):
        self.loop.begin_training(state)

    def on_step_begin(self, args, state, control, **kwargs):
        return self.loop.begin_step(state, control)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.loop.before_optimizer_step(state)

    def on_step_end(self, args, state, control, **kwargs):
        return self.loop.end_step(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.loop.plan.is_round_end(state.global_step) and not control.should_training_stop:
            raise RuntimeError(
                "A round ended before all of its tasks were tuned: control.should_epoch_stop is not supported; use "
                "control.should_training_stop."
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loop.check_log(state, logs or {})

    def on_train_end(self, args, state, control, **kwargs):
        self.loop.end_training(state)


class LastWordCallback(ATMCallback):
    """Stands last in the list: keeps a run that stops inside a round from scoring one task's weights as the model,
    and prints the table."""

    def __init__(self, loop: ATMLoop) -> None:
        self.loop = loop
        self.printed: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.printed = None

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.loop.plan.is_round_end(state.global_step):
            control.should_evaluate = False
        elif not control.should_evaluate:
            self._finish_round(args, state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.loop.attach_metrics(state, metrics or {}):
            self._finish_round(args, state)

    def _finish_round(self, args: Any, state: TrainerState) -> None:
        if not state.is_world_process_zero or not self.loop.records or self.printed == self.loop.records[-1]["round"]:
            return
        self.printed = self.loop.records[-1]["round"]
        self.loop.write_report()
        if args.round_table:
            tqdm.write(round_table(self.loop.records[-1], args.num_rounds))


def round_table(record: dict[str, Any], num_rounds: int) -> str:
    """One round's scores as text: a line per task, then the average.

    Args:
        record (`dict`): one entry of `trainer.report`.
        num_rounds (`int`): rounds of the run.
    """
    tasks, seconds = record["tasks"], record["seconds"]
    merged, experts = record["scores"], record["expert_scores"]
    width = max(len("average"), *map(len, tasks))
    lines = [
        f"Round {record['round'] + 1}/{num_rounds}  {record['method']}  "
        + "  ".join(f"{name} {seconds[name]:.1f} s" for name in sorted(seconds)),
        f"  {'task':<{width}}  {'loss':>8}  {'|tau|':>8}"
        + (f"  {'expert':>8}" if experts else "")
        + (f"  {'merged':>8}  metric" if merged else ""),
    ]
    for task in tasks:
        line = f"  {task:<{width}}  {_cell(record['losses'].get(task))}  {record['task_vector_norms'][task]:>8.3g}"
        line += f"  {_cell(experts.get(task))}" if experts else ""
        line += f"  {_cell(merged.get(task))}  {record['metric_names'].get(task, '')}" if merged else ""
        lines.append(line.rstrip())
    if merged or experts:
        line = f"  {'average':<{width}}  {'':>8}  {'':>8}"
        line += f"  {_cell(_mean(experts))}" if experts else ""
        line += f"  {_cell(_mean(merged))}" if merged else ""
        lines.append(line)
    return "\n".join(lines)


def _mean(scores: dict[str, float]) -> float | None:
    return sum(scores.values()) / len(scores) if scores else None


def _cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:>8.4f}"
