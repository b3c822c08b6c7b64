"""`hf-atm compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..baselines.cells import Suite
from ..baselines.compare import FIGURE_NAME, RESULT_NAME, TABLE_NAME
from ..baselines.compare import compare as run_comparison
from ..baselines.members import Member, parse_members
from .console import calm_libraries
from .experiment import Experiment, as_mapping, parse_settings, read_experiment
from .progress import calm_trainer
from .workbench import Workbench, build_model, build_workbench


def compare(
    config: str,
    overrides: Sequence[str] = (),
    names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    quiet: bool = False,
) -> int:
    """Runs the comparison of a YAML file and prints its table.

    Args:
        config (`str`): The file; its `compare` section names members, seeds and steps.
        overrides (`Sequence[str]`): `--field value` of [`ATMConfig`], replacing the file's common settings.
        names (`Sequence[str]`, *optional*): Only these members.
        seeds (`Sequence[int]`, *optional*): Replaces the file's seeds.
        steps (`int`, *optional*): Replaces the file's optimizer steps per task.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
    """
    experiment = read_experiment(config, overrides)
    members = choose_members(experiment, names)
    seeds = _whole_numbers("compare.seeds", seeds, experiment.compare.get("seeds", experiment.args.seed))
    given = experiment.compare.get("steps")
    (steps,) = _whole_numbers("compare.steps", steps, _default_steps(experiment) if given is None else given)
    if steps < 1:
        raise ValueError(f"compare.steps is {steps}; it must be at least 1.")
    for task in experiment.tasks.values():
        if task.train_split is None or task.eval_split is None:
            raise ValueError(f"task {task.name!r} needs train_split and eval_split for a comparison.")
    calm_libraries()
    experiment.args.disable_tqdm = quiet
    suite = build_suite(experiment, build_workbench(experiment, with_model=False))
    output = Path(experiment.args.output_dir)
    run_comparison(suite, members, seeds, steps, output, report=lambda line: print(line, flush=True))
    print("\n" + (output / TABLE_NAME).read_text(encoding="utf-8"))
    print(f"{output / TABLE_NAME}, {output / FIGURE_NAME}, {output / RESULT_NAME}")
    return 0


def choose_members(experiment: Experiment, names: Sequence[str] | None) -> list[Member]:
    """The members of a file, or those of them that `names` lists, their settings read as the command line would."""
    raw = experiment.compare.get("members") or {}
    if isinstance(raw, list):
        raw = dict.fromkeys(map(str, raw))
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError("the config has no compare.members; name at least one, such as {joint: {}, atm: {}}")
    unknown = [name for name in names or () if name not in raw]
    if unknown:
        raise KeyError(f"unknown member {unknown[0]!r}; the members are {', '.join(map(str, raw))}")
    own = ("baseline", "merges")
    members: dict[str, Any] = {}
    for name in names or raw:
        given = dict(as_mapping(f"compare.members.{name}", raw[name] or {}))
        kept = {key: given.pop(key) for key in own if key in given}
        members[name] = {**kept, **parse_settings(given, where=f"compare.members.{name}")}
    return parse_members(members)


def build_suite(experiment: Experiment, bench: Workbench) -> Suite:
    """Data loaded once, and a fresh model for every run."""
    args = experiment.args
    # What a run leaves behind is its cell; checkpoints are there to go on from.
    args.save_total_limit = 1
    args.round_table = False

    def prepare(trainer: Any) -> None:
        calm_trainer(trainer)

    return Suite(
        build_model=lambda seed: build_model(experiment.model, bench.tasks, seed),
        train=bench.split("train"),
        validation=bench.split("eval"),
        test=bench.split("test"),
        args=args,
        trainer_kwargs={**bench.trainer_kwargs, "processing_class": bench.processing_class},
        identity=experiment.identity,
        prepare=prepare,
    )


def _whole_numbers(key: str, given: Any, otherwise: Any) -> list[int]:
    """What the command line gave, or else what the file says: one whole number or several."""
    value = otherwise if given is None else given
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ValueError(f"{key} must be whole numbers, not {value!r}.")
    return values


def _default_steps(experiment: Experiment) -> int:
    args = experiment.args
    if args.local_steps is None:
        raise ValueError("compare.steps is missing: give the optimizer steps per task, or training.local_steps.")
    return args.num_rounds * args.local_steps
