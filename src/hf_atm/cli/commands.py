"""`hf-atm train` and `hf-atm evaluate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from .. import ATMTrainer, MultiTaskModel
from ..checkpoint import write_json
from ..modeling import MultiTaskConfig
from ..scoring import Scorer
from .console import calm_libraries, score_table
from .experiment import Experiment, read_experiment
from .progress import calm_trainer
from .workbench import Workbench, build_workbench, check_model, keep_heads


def train(config: str, overrides: Sequence[str] = (), quiet: bool = False) -> int:
    """Runs the experiment of a YAML file and saves what comes of it.

    Written to the output directory, beside what the trainer writes: the model with its tokenizer or image processor,
    its card with pictures, `tasks/<task>/` with a stock model each if `export_tasks` is set, and `test_metrics.json` if
    tasks have a `test_split`. With `push_to_hub` all of it goes to the Hub in one commit.

    Args:
        config (`str`): The file.
        overrides (`Sequence[str]`, *optional*): `--field value` of [`ATMConfig`], replacing the file's.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar and no table per round.

    Returns:
        `int`: 0, or 1 when the run diverged; the last good merged model is saved even then.
    """
    experiment = read_experiment(config, overrides)
    args = experiment.args
    if quiet:
        args.disable_tqdm, args.round_table = True, False
    calm_libraries()
    export_or_refuse(experiment)
    if experiment.schedule:
        from .continual import train_in_stages

        return train_in_stages(experiment, quiet)
    bench = build_workbench(experiment)
    trainer = build_trainer(experiment, bench)
    if not quiet:
        plan = trainer.atm.plan
        sizes = ", ".join(f"{task} {len(data)}" for task, data in sorted(bench.split("train").items()))
        print(f"{len(plan.tasks)} tasks ({sizes} examples), {plan.num_rounds} rounds of {plan.round_steps} steps")
    try:
        trainer.train(resume_from_checkpoint=resume_value(args.resume_from_checkpoint))
    except FloatingPointError as error:
        trainer.save_merged()
        print(f"hf-atm: {error} It is saved in {args.output_dir}.", file=sys.stderr)
        return 1
    trainer.save_merged()
    tests = bench.split("test")
    metrics = trainer.evaluate(tests, metric_key_prefix="test") if tests else {}
    if trainer.is_world_process_zero():
        if experiment.export_tasks:
            export_tasks(trainer.model, bench, Path(args.output_dir) / "tasks")
        if tests:
            write_json(Path(args.output_dir) / "test_metrics.json", metrics)
    publish(trainer)
    if trainer.is_world_process_zero():
        _print_summary(trainer, bench, metrics)
    return 0


def publish(trainer: ATMTrainer) -> None:
    """Writes the model card and, if `push_to_hub` is set, uploads all that the run left, exports included."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card(model_name=Path(trainer.args.output_dir).absolute().name)


def build_trainer(
    experiment: Experiment,
    bench: Workbench,
    train: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> ATMTrainer:
    """The trainer of a loaded experiment, with the console's single progress bar; data may be given."""
    for name, task in experiment.tasks.items():
        if task.train_split is None and train is None:
            raise ValueError(f"task {name!r} has no train_split; set it, or use hf-atm evaluate")
    trainer = ATMTrainer(
        model=bench.model,
        args=experiment.args,
        train_dataset=bench.split("train") if train is None else train,
        eval_dataset=(bench.split("eval") if evaluation is None else evaluation) or None,
        processing_class=bench.processing_class,
        **bench.trainer_kwargs,
    )
    calm_trainer(trainer)
    return trainer


def export_or_refuse(experiment: Experiment) -> None:
    """Refuses an export of stock models that could not be made after the run."""
    if not experiment.export_tasks:
        return
    if "causal_lm" in experiment.model:
        raise ValueError("export_tasks is for models with heads; a causal language model is one stock model already")
    episodic = [name for name, task in experiment.tasks.items() if task.head is not None]
    if episodic:
        raise ValueError(
            f"export_tasks needs stock heads, and task {episodic[0]!r} has head: {experiment.tasks[episodic[0]].head}; "
            "remove one"
        )
    if experiment.model.get("pooling") is not None:
        raise ValueError(
            f"export_tasks needs the family's own pooling, not pooling: {experiment.model['pooling']}; remove one"
        )


def export_tasks(model: Any, bench: Workbench, folder: Path) -> None:
    """Writes a stock model per task, with its tokenizer or image processor. An adapter is merged into the weights."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    for task in sorted(bench.tasks):
        plain.to_task_model(task).save_pretrained(folder / task)
        bench.processing_class.save_pretrained(folder / task)


def evaluate(
    model: str,
    config: str,
    split: str = "eval",
    tasks: Sequence[str] | None = None,
    batch_size: int = 64,
    output: str | None = None,
    quiet: bool = False,
) -> int:
    """Evaluates a saved model on the tasks of a YAML file and prints a table.

    Args:
        model (`str`): Folder or Hub id of a [`MultiTaskModel`], a causal language model, or a stock classifier; the
            last knows one task, to be named in `tasks`.
        config (`str`): The file that names the tasks.
        split (`str`, *optional*, defaults to `"eval"`): `"eval"` or `"test"`.
        tasks (`Sequence[str]`, *optional*): Only these tasks.
        batch_size (`int`, *optional*, defaults to 64): Examples per batch.
        output (`str`, *optional*): JSON file for the metrics.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar.
    """
    calm_libraries()
    experiment = read_experiment(config)
    chosen = list(experiment.tasks) if tasks is None else list(tasks)
    unknown = [task for task in chosen if task not in experiment.tasks]
    if unknown:
        raise KeyError(f"unknown task {unknown[0]!r}; the tasks of {config!r} are {', '.join(experiment.tasks)}")
    loaded = load_model(model, causal_lm="causal_lm" in experiment.model)
    if isinstance(loaded, MultiTaskModel):
        foreign = [task for task in chosen if task not in loaded.heads]
        if foreign:
            raise KeyError(f"model {model!r} has no task {foreign[0]!r}; its tasks are {', '.join(loaded.heads)}")
    elif "causal_lm" not in experiment.model and len(chosen) != 1:
        raise ValueError(f"model {model!r} is a single-task model; name its task with --tasks")
    for task in experiment.tasks.values():
        if split == "test" and task.name in chosen and task.test_split is None:
            raise ValueError(f"task {task.name!r} has no test_split; add it to {config!r}")
        # Splits that are not looked at need not be read.
        task.eval_split = task.eval_split if split == "eval" else None
        task.test_split = task.test_split if split == "test" else None
    experiment.tasks = {name: experiment.tasks[name] for name in chosen}
    bench = build_workbench(experiment, loaded)
    metrics, scores, names = _evaluate(loaded, experiment, bench, split, batch_size, quiet)
    print(score_table(chosen, {Path(model).name: scores}, split))
    print("metrics: " + ", ".join(f"{name} {names[name]}" for name in chosen))
    if output is not None:
        write_json(Path(output), metrics)
    return 0


def load_model(model: str, causal_lm: bool, headless: bool = False) -> Any:
    """A saved model of the kind its configuration and the experiment call for, in fp32.

    Args:
        model (`str`): Folder or Hub id.
        causal_lm (`bool`): Whether the experiment is about language modelling.
        headless (`bool`, *optional*, defaults to `False`): Load a single-task model without its head.
    """
    import torch

    if not os.path.isdir(model) and model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model {model!r} is not a folder")
    kind = check_model(model)
    if isinstance(kind, MultiTaskConfig):
        return MultiTaskModel.from_pretrained(model)
    if causal_lm:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModel, AutoModelForImageClassification

    if headless:
        return AutoModel.from_pretrained(model, dtype=torch.float32)
    text = type(kind) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    auto = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    return auto.from_pretrained(model, dtype=torch.float32)


def _evaluate(
    model: Any, experiment: Experiment, bench: Workbench, split: str, batch_size: int, quiet: bool
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """All metrics, and value and name of each task's first one."""
    from ..config import ATMConfig

    settings: dict[str, Any] = {
        "per_device_eval_batch_size": batch_size,
        "disable_tqdm": quiet,
        "report_to": [],
        "use_cpu": experiment.args.use_cpu,
        "seed": experiment.args.seed,
        "output_dir": experiment.args.output_dir,
    }
    data, kwargs = bench.split(split), dict(bench.trainer_kwargs)
    if isinstance(model, MultiTaskModel) or "causal_lm" in experiment.model:
        keep_heads(model, data)
        args = ATMConfig(local_steps=1, dataloader_drop_last=False, **settings)
        trainer: Any = Scorer(
            model, args, train_dataset=data, eval_dataset=data, processing_class=bench.processing_class, **kwargs
        )
        calm_trainer(trainer)
        metrics = trainer.evaluate(metric_key_prefix=split)
        return metrics, *trainer.scores(metrics, split)
    from transformers import TrainingArguments

    (task,) = data
    kwargs["compute_metrics"] = kwargs["compute_metrics"][task]
    if model.num_labels != bench.tasks[task].spec.num_labels:
        raise ValueError(
            f"the model has {model.num_labels} labels and task {task!r} has {bench.tasks[task].spec.num_labels}"
        )
    trainer = Trainer(model, TrainingArguments(**settings), processing_class=bench.processing_class, **kwargs)
    calm_trainer(trainer)
    metrics = trainer.evaluate(data[task], metric_key_prefix=f"{split}_{task}")
    first = (bench.tasks[task].spec.metrics or [])[0]
    return metrics, {task: metrics[f"{split}_{task}_{first}"]}, {task: first}


def resume_value(value: str | bool | None) -> str | bool | None:
    """`resume_from_checkpoint` as the command line writes it: words for true and false, else a folder."""
    words = {"true": True, "false": False, "none": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _print_summary(trainer: ATMTrainer, bench: Workbench, test: Mapping[str, float]) -> None:
    tasks = sorted(bench.tasks)
    rows: dict[str, Mapping[str, float]] = {}
    records = [record for record in trainer.report if record.get("scores")]
    if records:
        rows[f"merged, round {records[-1]['round'] + 1}"] = records[-1]["scores"]
        if records[-1].get("expert_scores"):
            rows["its experts"] = records[-1]["expert_scores"]
    if test:
        rows["test split"], _ = trainer.scores(test, "test")
    if rows:
        print("\n" + score_table(tasks, rows))
    print(f"\nThe merged model is in {trainer.args.output_dir}")
