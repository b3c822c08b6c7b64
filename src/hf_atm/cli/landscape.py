"""`hf-atm landscape`: the loss over the plane of a run's start, its merged model and an expert."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from ..analysis.landscape import Landscape, Plane, loss_landscape
from ..checkpoint import write_json
from ..figures import draw_landscape
from .commands import build_trainer, load_model
from .console import calm_libraries
from .experiment import Experiment, read_experiment
from .workbench import Workbench, build_workbench, keep_heads


def landscape(run: str, config: str, options: Any, quiet: bool = False) -> int:
    """Measures and draws the landscape of a finished run.

    Args:
        run (`str`): Its `output_dir`, with a whole model.
        config (`str`): The YAML file it was trained with.
        options (`argparse.Namespace`): The command's options.
        quiet (`bool`, *optional*, defaults to `False`): Print nothing.

    Returns:
        `int`: 0.
    """
    experiment, tasks = _checked(run, config, options)
    calm_libraries()
    experiment.args = _plain(experiment.args, quiet)
    merged = load_model(run, causal_lm="causal_lm" in experiment.model)
    with tempfile.TemporaryDirectory() as scratch:
        experiment.args.output_dir = scratch
        # As in the run itself: the same data, and for a model without pretrained weights the same first values.
        bench = build_workbench(experiment)
        start = {name: value.detach().clone() for name, value in bench.model.named_parameters()}
        expert = _expert(experiment, bench, options.expert)
        tuned = {name: parameter.detach().clone() for name, parameter in expert.atm.groups.shared.items()}
        data = {
            task: part.select(range(min(options.examples, len(part))))
            for task, part in bench.split("eval").items()
            if task in tasks
        }
        bench.model = merged
        trainer = build_trainer(experiment, bench, bench.split("train"), data)
        shared = {name: parameter.detach().clone() for name, parameter in trainer.atm.groups.shared.items()}
        plane = Plane.through(*({name: state[name] for name in shared} for state in (start, shared, tuned)))
        with tqdm(total=options.resolution**2 + 3, desc="measuring", disable=True if quiet else None) as bar:
            result = loss_landscape(
                merged,
                plane,
                lambda: float(trainer.evaluate(data)["eval_loss"]),
                resolution=options.resolution,
                path=[{name: state[name] for name in shared} for state in _rounds(Path(run), shared)],
                report=bar.update,
            )
    _write(Path(run), result, options.expert)
    if not quiet:
        print(f"{run}/figures/landscape.png and .svg; the numbers are in {run}/landscape.json")
    return 0


def _checked(run: str, config: str, options: Any) -> tuple[Experiment, list[str]]:
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{run!r} holds no whole model (config.json); name the output_dir of a finished run")
    experiment = read_experiment(config)
    for task in (options.expert, *(options.tasks or ())):
        if task not in experiment.tasks:
            raise KeyError(f"unknown task {task!r}; the tasks of {config!r} are {', '.join(experiment.tasks)}")
    tasks = options.tasks or list(experiment.tasks)
    unscored = [task for task in tasks if experiment.tasks[task].eval_split is None]
    if unscored:
        raise ValueError(f"task {unscored[0]!r} has no eval_split to measure a loss on; leave it out with --tasks")
    if options.resolution < 2 or options.examples < 1:
        raise ValueError("--resolution must be at least 2 and --examples at least 1")
    experiment.model.pop("peft", None)
    return experiment, tasks


def _plain(args: Any, quiet: bool) -> Any:
    """The settings of one segment of plain tuning, as long as a task was tuned in the whole run."""
    length: dict[str, Any] = (
        {"local_epochs": args.local_epochs * args.num_rounds}
        if args.local_steps is None
        else {"local_steps": args.local_steps * args.num_rounds}
    )
    return dataclasses.replace(
        args,
        **length,
        num_rounds=1,
        merge_method="mean",
        merge_kwargs={},
        outer_learning_rate=1.0,
        outer_momentum=0.0,
        moment_exponent=0.0,
        head_steps=0,
        task_weights="uniform",
        task_specific_modules=[],
        optimizer_policy="reset",
        diagnostics="off",
        eval_strategy="no",
        eval_experts=False,
        save_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        report_to=[],
        round_table=False,
        resume_from_checkpoint=None,
        disable_tqdm=True if quiet else args.disable_tqdm,
    )


def _expert(experiment: Experiment, bench: Workbench, task: str) -> Any:
    """The trainer that has tuned one task alone."""
    kwargs = dict(bench.trainer_kwargs)
    if isinstance(kwargs.get("compute_metrics"), Mapping):
        kwargs["compute_metrics"] = {task: kwargs["compute_metrics"][task]}
    keep_heads(bench.model, [task])
    alone = dataclasses.replace(bench, trainer_kwargs=kwargs)
    trainer = build_trainer(experiment, alone, {task: bench.split("train")[task]}, {})
    trainer.train()
    return trainer


def _rounds(run: Path, shared: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The shared weights after each round that left a whole checkpoint, in order."""
    found = []
    numbered = [
        (int(path.name.split("-")[1]), path) for path in run.glob("checkpoint-*") if re.search(r"-\d+$", path.name)
    ]
    for _, path in sorted(numbered):
        file = path / "model.safetensors"
        if not file.is_file():
            continue
        with safe_open(file, "pt") as handle:
            names = set(handle.keys())
            if names >= set(shared):
                found.append({name: handle.get_tensor(name) for name in shared})
    return found


def _write(run: Path, result: Landscape, expert: str) -> None:
    draw_landscape(result, ["start", "merged", f"expert of {expert}"], run / "figures" / "landscape")
    write_json(run / "landscape.json", dataclasses.asdict(result))
