"""What few-shot methods must beat: a classifier trained on base classes, and plain features, each with a new
logistic regression per episode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from ..seeding import derive_seed, isolated_rng
from .collating import collate_rows
from .encoders import EpisodeEncoder, PooledEncoder
from .episodes import EpisodeSampler, labels_of
from .evaluation import embed_rows, episode_scores, summarize_episodes
from .settings import FewShotConfig


def probe_episodes(
    features: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    n_way: int,
    k_shot: int,
    n_query: int,
    num_episodes: int = 5000,
    classes: Iterable[int] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Scores of a logistic regression fitted to each episode's standardised support.

    Args:
        features (`np.ndarray`): `(rows, features)`.
        labels (`Sequence[int]`): One per row.
        n_way, k_shot, n_query, num_episodes, classes, seed: As in [`evaluate_episodes`]; equal ones give equal
            episodes.

    Returns:
        `dict[str, float]`: `accuracy`, `ci95` and `macro_f1`.
    """
    sampler = EpisodeSampler(np.asarray(labels), n_way, k_shot, n_query, num_episodes, classes, seed)
    features = np.asarray(features, dtype=np.float64)
    members = np.repeat(np.arange(n_way), k_shot)
    predictions = np.empty((num_episodes, n_way * n_query), dtype=np.int64)
    for index in range(num_episodes):
        episode = sampler[index]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(features[episode.support.ravel()], members)
        predictions[index] = probe.predict(features[episode.query.ravel()])
    truth = torch.arange(n_way).repeat_interleave(n_query)
    return summarize_episodes(*episode_scores(torch.from_numpy(predictions), truth, n_way))


class _Classifier(nn.Module):
    """An encoder and a linear layer over the base classes."""

    accepts_loss_kwargs = False

    def __init__(self, encoder: EpisodeEncoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.embedding_dim, num_classes)

    def forward(self, items: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.encoder(items))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def finetune_baseline(
    encoder: nn.Module,
    args: FewShotConfig,
    train_dataset: Any,
    test_dataset: Any,
    item_collator: Callable | None = None,
    train_classes: Iterable[int] | None = None,
    test_classes: Iterable[int] | None = None,
    num_episodes: int = 5000,
    batch_size: int = 64,
    pooling: str = "mean",
) -> dict[str, float]:
    """Trains a classifier of the base classes, freezes its encoder, and fits a new classifier to each test episode.

    The baseline of https://huggingface.co/papers/1904.04232. It sees as many samples as episodic training with the
    same `args` would embed: `n_way * (k_shot + n_query)` per episode.

    Args:
        encoder ([`EpisodeEncoder`] or [`PreTrainedModel`]): Where to start; copied.
        args ([`FewShotConfig`]): Episodes, learning rate and seed.
        train_dataset, test_dataset (`Dataset`): Map-style, with labels.
        item_collator (`Callable`, *optional*): See [`EpisodeCollator`].
        train_classes, test_classes (`Iterable[int]`, *optional*): Labels to use; all by default.
        num_episodes (`int`, *optional*, defaults to 5000): Test episodes, those of [`evaluate_episodes`] with
            `args.seed`.
        batch_size (`int`, *optional*, defaults to 64): Samples per step.
        pooling (`str`, *optional*, defaults to `"mean"`): Of a transformers backbone.

    Returns:
        `dict[str, float]`: `accuracy`, `ci95` and `macro_f1`.
    """
    encoder = copy.deepcopy(encoder)
    if isinstance(encoder, PreTrainedModel):
        encoder = PooledEncoder(encoder, pooling)
    if not isinstance(encoder, EpisodeEncoder) or encoder.per_episode:
        raise ValueError(
            f"{type(encoder).__name__} gives no embedding of its own to each sample, and a classifier needs one; use "
            "norm='graph'."
        )
    labels = labels_of(train_dataset)
    wanted = np.unique(labels) if train_classes is None else np.unique(list(train_classes))
    rows = np.flatnonzero(np.isin(labels, wanted)).tolist()
    with isolated_rng(derive_seed(args.seed, "classifier")):
        model = _Classifier(encoder, len(wanted))
    classes = torch.from_numpy(np.searchsorted(wanted, labels))

    def collate(batch: list[int]) -> dict[str, Any]:
        return {"items": collate_rows(train_dataset, batch, item_collator), "labels": classes[batch]}

    settings = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=_steps(args, batch_size),
        per_device_train_batch_size=min(batch_size, len(rows)),
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        **{name: getattr(args, name) for name in _SHARED},
    )
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    features = embed_rows(model, test_dataset, np.arange(len(test_dataset)), item_collator)
    return probe_episodes(
        features.cpu().numpy(),
        labels_of(test_dataset),
        args.n_way,
        args.k_shot,
        args.n_query,
        num_episodes,
        test_classes,
        args.seed,
    )


_SHARED = (
    *("learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "seed", "use_cpu", "disable_tqdm"),
    *("logging_strategy", "bf16", "fp16"),
)


def _steps(args: FewShotConfig, batch_size: int) -> int:
    """Steps in which a classifier sees as many samples as episodic training embeds."""
    episodes = args.num_train_epochs * args.episodes_per_epoch
    if args.max_steps > 0:
        episodes = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return max(1, math.ceil(episodes * args.n_way * (args.k_shot + args.n_query) / batch_size))
