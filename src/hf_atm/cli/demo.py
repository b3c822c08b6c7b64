"""`hf-atm demo`: the method on real images, offline, in about a minute."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from .. import ATMConfig, ATMTrainer, MultiTaskModel
from ..checkpoint import write_json
from ..metrics import build_compute_metrics
from ..model_card import write_card
from ..tasks import make_image_processor
from .console import calm_libraries, score_table
from .demo_data import BASE_LABELS, LABELS, QUESTIONS, SIZE, Labelled, build_data


_BASE_STEPS = 800
_BATCH = 32
_RATE = 1e-3
_MARK = "demo.json"


def run_demo(output: str, seed: int = 0, rounds: int = 20, steps: int = 12, quiet: bool = False) -> int:
    """Pretrains a small ViT, then compares ATM with a one-shot merge and single-task experts.

    All are tuned for `rounds * steps` optimizer steps per task, from the same base, on the same data. The one-shot
    merge is ATM with a single round of that many steps, and its experts are the models it merges.

    Args:
        output (`str`): Folder for the merged model, replaced if an earlier demo wrote it.
        seed (`int`, *optional*, defaults to 0): Decides everything.
        rounds (`int`, *optional*, defaults to 20): Rounds of ATM.
        steps (`int`, *optional*, defaults to 12): Optimizer steps per task and round.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar.

    Raises:
        ValueError: If the folder holds something else, or a number is too small.
    """
    if rounds < 1 or steps < 1:
        raise ValueError(f"--rounds and --steps must be at least 1, not {rounds} and {steps}")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / _MARK).is_file()):
        raise ValueError(f"{output!r} holds something other than a demo's model; choose another folder with --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    calm_libraries()
    # A model this small gains nothing from a second core, and waits for it when the core is busy.
    torch.set_num_threads(1)
    base_data, train_data, test_data = build_data(seed)
    tasks = list(QUESTIONS)
    budget = rounds * steps
    print(f"Five tasks of real images from scikit-learn, {SIZE} x {SIZE} pixels, one ViT, {budget} steps per task:")
    for task, question in QUESTIONS.items():
        sizes = f"{len(train_data[task][1])} to tune, {len(test_data[task][1])} to test"
        print(f"  {task:<7} {question} ({sizes})")
    train = {task: to_examples(data) for task, data in train_data.items()}
    test = {task: to_examples(data) for task, data in test_data.items()}

    total = _BASE_STEPS + 2 * len(tasks) * budget
    with (
        tqdm(total=total, disable=True if quiet else None, unit="step") as bar,
        tempfile.TemporaryDirectory() as scratch,
    ):
        backbone = pretrain_backbone(to_examples(base_data), seed, bar, scratch)
        state = {name: value.clone() for name, value in backbone.state_dict().items()}
        rows: dict[str, Mapping[str, float]] = {"pretrained (probe)": _probe(backbone, train_data, test_data)}
        heads = {
            task: {"num_labels": len(names), "label2id": {name: index for index, name in enumerate(names)}}
            for task, names in LABELS.items()
        }

        def tune(name: str, **settings: Any) -> ATMTrainer:
            backbone.load_state_dict(state)
            model = MultiTaskModel.from_backbone(backbone, tasks=heads, seed=seed)
            args = ATMConfig(
                **_settings(f"{scratch}/{name}", seed),
                **settings,
                learning_rate=_RATE,
                lr_scheduler_type="linear",
                lr_schedule_scope="run",
                eval_strategy="epoch",
                round_table=False,
            )
            metrics = build_compute_metrics(["accuracy"])
            trainer = ATMTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=metrics)
            _watch(trainer, bar, name)
            trainer.train()
            return trainer

        once = tune("one-shot merge", num_rounds=1, local_steps=budget, eval_experts=True).report[-1]
        rows["one-shot merge"] = once["scores"]
        trainer = tune("ATM", num_rounds=rounds, local_steps=steps)
        for record in trainer.report:
            rows[f"ATM, round {record['round'] + 1}"] = record["scores"]
        rows["experts, one each"] = once["expert_scores"]
        trainer.save_model()
        _export(trainer, tasks, test_data["digit"][0][0])
        seconds = time.perf_counter() - started
        facts = {"seed": seed, "rounds": rounds, "steps": steps, "seconds": seconds, "scores": rows}
        write_json(Path(trainer.args.output_dir, _MARK), facts)
        levels = {name: rows[name] for name in ("one-shot merge", "experts, one each")}
        write_card(Path(trainer.args.output_dir), name=folder.name, repository=str(folder), levels=levels)
        _move(Path(trainer.args.output_dir), folder)
    print("\n" + score_table(tasks, _readable(rows, rounds), "test accuracy"))
    print(
        "\nThe probe is a logistic regression on frozen features, fitted until it converges. All other rows took"
        f"\n{budget} steps per task from the same base; the experts are five models, every other row is one."
    )
    print(
        f"\n{seconds:.0f} s. The merged model and its card are in {folder}, and it loads in plain transformers, one task at a time:\n"
    )
    print("    from transformers import pipeline")
    print(f'    classify = pipeline("image-classification", model="{folder}/tasks/digit")')
    print(f'    print(classify("{folder}/digit.png")[0])  # a {test_data["digit"][1][0]}')
    return 0


def _export(trainer: ATMTrainer, tasks: list[str], example: np.ndarray) -> None:
    """Adds the image processor, a stock model per task and one image to the saved model."""
    folder = Path(trainer.args.output_dir)
    processor = make_image_processor(SIZE)
    processor.save_pretrained(folder)
    for task in tasks:
        trainer.model.to_task_model(task).save_pretrained(folder / "tasks" / task)
        processor.save_pretrained(folder / "tasks" / task)
    Image.fromarray(example).save(folder / "digit.png")


def _move(source: Path, target: Path) -> None:
    """Puts a finished folder in place of an earlier one."""
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.move(source, beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def _readable(rows: Mapping[str, Mapping[str, float]], rounds: int) -> dict[str, Mapping[str, float]]:
    """Leaves out every other round of a long run; all of them stay in `demo.json`."""
    hidden = {f"ATM, round {r}" for r in range(2, rounds) if rounds > 12 and (rounds - r) % 2}
    return {name: scores for name, scores in rows.items() if name not in hidden}


class _BarCallback(TrainerCallback):
    """Moves one bar that several trainers share."""

    def __init__(self, bar: tqdm, name: str) -> None:
        self.bar, self.name = bar, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.set_description(f"{self.name:<14}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()


def _watch(trainer: Trainer, bar: tqdm, name: str) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_BarCallback(bar, name))


def _settings(folder: str, seed: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "seed": seed,
        "per_device_train_batch_size": _BATCH,
        "per_device_eval_batch_size": 500,
        "dataloader_drop_last": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
    }


def pretrain_backbone(examples: list[dict], seed: int, bar: tqdm, scratch: str) -> Any:
    """A small ViT, trained for 800 steps by the plain Trainer on images that no task sees; its backbone.

    Args:
        examples (`list[dict]`): from [`to_examples`].
        seed (`int`): decides weights and order.
        bar (`tqdm`): is moved with every step.
        scratch (`str`): folder for what the Trainer writes.
    """
    set_seed(seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=BASE_LABELS,
    )
    model = ViTForImageClassification(config)
    args = TrainingArguments(
        **_settings(f"{scratch}/base", seed),
        max_steps=_BASE_STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=examples)
    _watch(trainer, bar, "pretraining")
    trainer.train()
    return trainer.model.vit


def _probe(backbone: Any, train: Mapping[str, Labelled], test: Mapping[str, Labelled]) -> dict[str, float]:
    scores = {}
    for task in train:
        x, y = (_features(backbone, data[task][0]) for data in (train, test))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = LogisticRegression(max_iter=300).fit(x, train[task][1])
        scores[task] = float(fitted.score(y, test[task][1]))
    return scores


@torch.no_grad()
def _features(backbone: Any, images: np.ndarray) -> np.ndarray:
    backbone.eval()
    return backbone(pixel_values=_pixels(images)).last_hidden_state[:, 0].numpy()


def _pixels(images: np.ndarray) -> torch.Tensor:
    # As the image processor normalises: mean and deviation one half.
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def to_examples(data: Labelled) -> list[dict[str, Any]]:
    """Images `(n, 16, 16, 3)` uint8 and labels as examples for the Trainer: `pixel_values` in -1 to 1, `labels`."""
    images, labels = data
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(_pixels(images), labels, strict=True)]


if __name__ == "__main__":
    sys.exit(run_demo("runs/demo"))
