"""`hf-atm train` on a file with a `schedule`: tasks that arrive over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..continual import ContinualRun, ContinualSettings, ContinualSuite, Stage, run_stages
from .commands import export_tasks, load_model
from .console import score_table
from .experiment import Experiment
from .progress import calm_trainer
from .workbench import Workbench, build_model, build_workbench


def train_in_stages(experiment: Experiment, quiet: bool = False) -> int:
    """Runs the stages of a schedule and prints what each left of every task.

    Args:
        experiment ([`Experiment`]): Checked, with a schedule.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar.
    """
    args = experiment.args
    for task in experiment.tasks.values():
        if task.train_split is None or task.eval_split is None:
            raise ValueError(f"task {task.name!r} needs train_split and eval_split for a schedule.")
    args.round_table = False
    bench = build_workbench(experiment, with_model=False)
    suite = build_suite(experiment, bench)
    rows: dict[str, dict[str, float]] = {}

    def report(index: int, stage: Stage) -> None:
        rows[f"stage {index + 1} (+ {', '.join(stage.new)})"] = stage.validation
        if not quiet:
            print(f"stage {index + 1} of {len(experiment.schedule)} done: {', '.join(stage.new)}", flush=True)

    run = run_stages(suite, experiment.schedule, ContinualSettings.parse(experiment.continual), report)
    _print(run, rows, bench, args.output_dir)
    last = Path(args.output_dir) / f"stage-{len(experiment.schedule)}"
    if experiment.export_tasks:
        export_tasks(load_model(str(last), causal_lm=False), bench, last / "tasks")
    print(f"\nThe model of all tasks is in {last}")
    return 0


def build_suite(experiment: Experiment, bench: Workbench) -> ContinualSuite:
    """Data of all tasks, and a model with heads for the first stage."""
    first = {name: bench.tasks[name] for name in experiment.schedule[0]}
    causal_lm = "causal_lm" in experiment.model
    return ContinualSuite(
        model=build_model(experiment.model, first, experiment.args.seed),
        heads={} if causal_lm else {name: task.head for name, task in bench.tasks.items()},
        train=bench.split("train"),
        validation=bench.split("eval"),
        test=bench.split("test"),
        args=experiment.args,
        trainer_kwargs={**bench.trainer_kwargs, "processing_class": bench.processing_class},
        identity=experiment.identity,
        prepare=calm_trainer,
    )


def _print(run: ContinualRun, rows: dict[str, dict[str, float]], bench: Workbench, output: Any) -> None:
    tasks = [task for stage in run.stages for task in stage.new]
    table = dict(rows)
    if run.stages[-1].test:
        table["last stage, test split"] = run.stages[-1].test
    print("\n" + score_table(tasks, table, "validation"))
    for part, figures in run.transfer.items():
        known = {name: value for name, value in figures.to_dict().items() if value is not None}
        print(f"{part}: " + ", ".join(f"{name} {value:+.3f}" for name, value in known.items()))
