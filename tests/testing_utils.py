"""Small models and data that the tests of the loop share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_atm import ATMConfig, ATMTrainer


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
requires_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason="the data folder beside the repository is absent"
)

# Task name -> number of labels; 1 is a regression.
TASKS = {"colour": 3, "shape": 2, "size": 1}


class TinyModel(nn.Module):
    """Two shared layers and a head per task."""

    def __init__(self, tasks: dict[str, int] | None = None, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        tasks = TASKS if tasks is None else tasks
        generator = torch.Generator().manual_seed(7)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict({task: nn.Linear(8, labels) for task, labels in sorted(tasks.items())})
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, task: str | None = None
    ) -> SequenceClassifierOutput:
        logits = self.heads[task](self.dropout(self.norm(self.body(features))))
        loss = None
        if labels is not None and logits.shape[1] == 1:
            loss = nn.functional.mse_loss(logits.squeeze(1), labels.float())
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make_data(task: str, size: int = 40, labels: int | None = None) -> datasets.Dataset:
    """Labels that a small net can learn, different for each task."""
    labels = TASKS[task] if labels is None else labels
    seed = sum(map(ord, task))
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size, 6)).astype(np.float32)
    projection = features @ rng.normal(size=(6, labels)).astype(np.float32)
    target: Any = projection[:, 0] if labels == 1 else projection.argmax(1)
    data = datasets.Dataset.from_dict({"features": features.tolist(), "labels": target.tolist()})
    return data.with_format("torch")


def make_datasets(sizes: dict[str, int] | None = None) -> dict[str, datasets.Dataset]:
    sizes = sizes or {"colour": 40, "shape": 24, "size": 32}
    return {task: make_data(task, size) for task, size in sizes.items()}


def make_config(output_dir: Any, **changes: Any) -> ATMConfig:
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_rounds": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "round_table": False,
        "dataloader_pin_memory": False,
    }
    return ATMConfig(**{**values, **changes})


def make_trainer(output_dir: Any, model: nn.Module | None = None, **changes: Any) -> ATMTrainer:
    """A trainer over the tiny model; keywords of the trainer itself are taken out of `changes`."""
    names = ("train_dataset", "eval_dataset", "compute_metrics", "data_collator", "callbacks", "peft_config")
    given = {name: changes.pop(name) for name in names if name in changes}
    given.setdefault("train_dataset", make_datasets())
    return ATMTrainer(TinyModel() if model is None else model, make_config(output_dir, **changes), **given)


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def negative_error(prediction: Any) -> dict[str, float]:
    return {"fit": -float(np.square(prediction.predictions.squeeze(-1) - prediction.label_ids).mean())}


METRICS = {"colour": accuracy, "shape": accuracy, "size": negative_error}
