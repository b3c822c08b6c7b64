"""`hf-atm refine`: post-hoc ATM from a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import MultiTaskModel
from ..checkpoint import write_json
from ..refine import Refinement, refine_arguments, split_for_refining
from ..refine import refine as run_refinement
from .commands import build_trainer, export_or_refuse, export_tasks, load_model, publish, resume_value
from .console import calm_libraries, score_table
from .experiment import read_experiment
from .workbench import Workbench, build_workbench, keep_heads


REPORT_NAME = "refine.json"


def refine(
    model: str,
    config: str,
    overrides: Sequence[str] = (),
    data: str = "validation",
    share: float = 1.0,
    holdout: float = 0.2,
    heads: Sequence[str] = (),
    quiet: bool = False,
) -> int:
    """Tunes and merges on from a merged model, and saves the best round, or the start if none is better.

    Args:
        model (`str`): Folder or Hub id: a [`MultiTaskModel`], a causal language model, or a merged backbone.
        config (`str`): The YAML file that names the tasks; its `training` section says how to tune.
        overrides (`Sequence[str]`): `--field value` of [`ATMConfig`].
        data (`str`, *optional*, defaults to `"validation"`): `"validation"` tunes on a part of `eval_split` and
            chooses the round on the rest; `"train"` tunes on `train_split` and chooses on all of `eval_split`.
        share (`float`, *optional*, defaults to 1.0): Fraction of that data used.
        holdout (`float`, *optional*, defaults to 0.2): Fraction of the validation data that chooses the round.
        heads (`Sequence[str]`): `TASK=MODEL` each: take the task's head from this stock model.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar and no table per round.
    """
    experiment = read_experiment(config, overrides)
    args = experiment.args
    for task in experiment.tasks.values():
        needed = ["eval_split"] if data == "validation" else ["train_split", "eval_split"]
        missing = [name for name in needed if getattr(task, name) is None]
        if missing:
            raise ValueError(f"task {task.name!r} has no {missing[0]}, and refining on {data} data needs it")
    export_or_refuse(experiment)
    sources = _parse_heads(heads, list(experiment.tasks))
    if quiet:
        args.disable_tqdm, args.round_table = True, False
    calm_libraries()
    loaded = load_model(model, causal_lm="causal_lm" in experiment.model, headless=True)
    bench = build_workbench(experiment, loaded, adapt=True)
    _fit_heads(bench, model, sources, experiment.model.get("pooling"))
    whole = bench.split("eval")
    if data == "validation":
        tune, choose = split_for_refining(whole, share, holdout, args.seed)
        if not choose:
            raise ValueError(
                "--holdout must be above 0 on validation data, or no data would be left to choose a round"
            )
    else:
        tune, _ = split_for_refining(bench.split("train"), share, 0.0, args.seed)
        choose = whole
    experiment.args = refine_arguments(args, has_metrics="compute_metrics" in bench.trainer_kwargs)
    trainer = build_trainer(experiment, bench, tune, choose)
    result = run_refinement(trainer, resume_value(args.resume_from_checkpoint))
    trainer.save_merged()
    tests = bench.split("test")
    metrics = trainer.evaluate(tests, metric_key_prefix="test") if tests else {}
    if trainer.is_world_process_zero():
        if experiment.export_tasks:
            export_tasks(trainer.model, bench, Path(args.output_dir) / "tasks")
        facts = {**result.to_dict(), "tuned_on": {task: len(part) for task, part in tune.items()}, "test": metrics}
        write_json(Path(args.output_dir) / REPORT_NAME, facts)
    publish(trainer)
    if trainer.is_world_process_zero():
        _print(trainer, bench, result, metrics)
    return 0


def _parse_heads(heads: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    sources = {}
    for entry in heads:
        task, separator, source = entry.partition("=")
        if not separator or not source:
            raise ValueError(f"--heads takes TASK=MODEL, not {entry!r}")
        if task not in tasks:
            raise KeyError(f"--heads names the unknown task {task!r}; the tasks are {', '.join(tasks)}")
        sources[task] = source
    return sources


def _fit_heads(bench: Workbench, name: str, sources: dict[str, str], pooling: str | None) -> None:
    """Puts heads where the merged model has none, and stock heads where they are asked for."""
    model = bench.model
    heads = {task: data.head for task, data in bench.tasks.items()}
    if not isinstance(model, MultiTaskModel):
        if not hasattr(model, "base_model") or model.base_model is not model:
            if sources:
                raise ValueError(f"model {name!r} takes no heads")
            return
        bench.model = model = MultiTaskModel.from_backbone(model, tasks=heads, pooling=pooling)
    missing = [task for task in heads if task not in model.heads]
    if missing:
        raise KeyError(f"model {name!r} has no task {missing[0]!r}; its tasks are {', '.join(model.heads)}")
    keep_heads(model, heads)
    for task, source in sources.items():
        model.load_head(task, source)


def _print(trainer: Any, bench: Workbench, result: Refinement, test: dict[str, float]) -> None:
    tasks = sorted(bench.tasks)
    start, names = trainer.scores(result.start)
    rows = {"before": start}
    if result.best_round:
        rows[f"best, round {result.best_round}"] = trainer.report[result.best_round - 1]["scores"]
    if test:
        rows["test split"], _ = trainer.scores(test, "test")
    if names:
        print("\n" + score_table(tasks, rows))
    if result.stopped:
        print(f"\nTuning ended early: {result.stopped}")
    if not result.best_round:
        print("\nNo round was better than the start, which is kept.")
    print(f"\nThe refined model is in {trainer.args.output_dir}")
