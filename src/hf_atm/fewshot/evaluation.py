"""Accuracy over many test episodes, with its interval."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .collating import EpisodeCollator, collate_rows
from .episodes import EpisodeSampler, labels_of
from .model import FewShotModel


def accuracy_interval(accuracies: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean of the episodes' accuracies and half the width of its 95 % interval, `1.96 * s / sqrt(n)`.

    The interval is that of the episodes drawn, not of training: repeat that with other seeds.

    Args:
        accuracies (`Sequence[float]`): One per episode; a single one has an interval of NaN.

    Returns:
        `tuple[float, float]`: mean and half width.
    """
    values = np.asarray(accuracies, dtype=np.float64)
    spread = values.std(ddof=1) if len(values) > 1 else math.nan
    return float(values.mean()), float(1.96 * spread / math.sqrt(len(values)))


def episode_scores(predictions: torch.Tensor, labels: torch.Tensor, n_way: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and macro-F1 of every episode.

    Args:
        predictions (`torch.Tensor` of shape `(E, Q)`): Classes from 0.
        labels (`torch.Tensor` of shape `(Q,)`): The true ones.
        n_way (`int`): Number of classes; one that is neither predicted nor true has an F1 of 0.
    """
    classes = torch.arange(n_way, device=predictions.device)
    guessed, true = predictions.unsqueeze(-1) == classes, (labels.to(predictions.device).unsqueeze(-1) == classes)
    hits = (guessed & true).sum(1).double()
    f1 = 2 * hits / (guessed.sum(1) + true.sum(0)).clamp_min(1)
    return (hits.sum(-1) / len(labels)).cpu().numpy(), f1.mean(-1).cpu().numpy()


def summarize_episodes(accuracies: np.ndarray, f1: np.ndarray) -> dict[str, float]:
    """`accuracy`, `ci95` and `macro_f1` over episodes."""
    accuracy, interval = accuracy_interval(accuracies)
    return {"accuracy": accuracy, "ci95": interval, "macro_f1": float(np.mean(f1))}


@torch.no_grad()
def evaluate_episodes(
    model: FewShotModel,
    dataset: Any,
    n_way: int,
    k_shot: int,
    n_query: int,
    num_episodes: int = 5000,
    classes: Iterable[int] | None = None,
    seed: int = 0,
    item_collator: Callable | None = None,
    episodes_per_batch: int = 32,
    items_per_batch: int = 256,
) -> dict[str, float]:
    """Scores a model on episodes fixed by `seed`.

    Where an item's embedding does not depend on its episode, every item is embedded once.

    Args:
        model ([`FewShotModel`]): The model; its mode is left as it was.
        dataset: A map-style data set with labels.
        n_way, k_shot, n_query (`int`): Classes, and support and query samples per class.
        num_episodes (`int`, *optional*, defaults to 5000): Episodes.
        classes (`Iterable[int]`, *optional*): Labels to draw from; all by default.
        seed (`int`, *optional*, defaults to 0): Decides the episodes.
        item_collator (`Callable`, *optional*): See [`EpisodeCollator`].
        episodes_per_batch (`int`, *optional*, defaults to 32): Episodes scored at once.
        items_per_batch (`int`, *optional*, defaults to 256): Items embedded at once.

    Returns:
        `dict[str, float]`: `loss` (mean cross-entropy), `accuracy` in [0, 1], `ci95` (half the width of its 95 %
        interval over episodes) and `macro_f1` (mean over episodes).
    """
    sampler = EpisodeSampler(labels_of(dataset), n_way, k_shot, n_query, num_episodes, classes, seed)
    collator = EpisodeCollator(item_collator, dataset)
    training, device = model.training, next(model.parameters()).device
    uncalibrated = copy.deepcopy(model.head.state_dict()) if getattr(model.head, "pending", False) else None
    model.eval()
    try:
        table, places = None, np.zeros(0, dtype=np.int64)
        if model.fixed_embeddings:
            rows = np.concatenate(list(sampler.rows.values()))
            table = embed_rows(model, dataset, rows, item_collator, items_per_batch)
            places = np.zeros(rows.max() + 1, dtype=np.int64)
            places[rows] = np.arange(len(rows))
        losses, accuracies, scores = [], [], []
        for start in range(0, num_episodes, episodes_per_batch):
            episodes = [sampler[i] for i in range(start, min(start + episodes_per_batch, num_episodes))]
            if table is not None:
                taken = np.stack([np.concatenate([e.support, e.query], axis=1) for e in episodes])
                output = model.classify(table[torch.from_numpy(places[taken]).to(device)], k_shot)
            else:
                batch = to_device(collator(episodes), device)
                output = model(batch["items"], batch["index"], k_shot)
            accuracy, f1 = episode_scores(output.logits.argmax(-1), output.labels, n_way)
            losses.append(float(output.loss) * len(episodes))
            accuracies.append(accuracy)
            scores.append(f1)
    finally:
        model.train(training)
        if uncalibrated:
            # A scale that these episodes set is not for what comes after.
            model.head.load_state_dict(uncalibrated)
    summary = summarize_episodes(np.concatenate(accuracies), np.concatenate(scores))
    return {"loss": math.fsum(losses) / num_episodes, **summary}


@torch.no_grad()
def embed_rows(
    model: Any,
    dataset: Any,
    rows: Sequence[int] | np.ndarray,
    item_collator: Callable | None = None,
    items_per_batch: int = 256,
) -> torch.Tensor:
    """Embeddings of the given rows by `model.encoder` without conditioning, `(rows, d)`, in its present mode."""
    device = next(model.parameters()).device
    batches = (
        to_device(collate_rows(dataset, rows[start : start + items_per_batch], item_collator), device)
        for start in range(0, len(rows), items_per_batch)
    )
    return torch.cat([model.encoder(batch) for batch in batches])


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device."""
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return value.to(device) if hasattr(value, "to") else value
