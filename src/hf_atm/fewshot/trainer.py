"""A Trainer whose batches are episodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..seeding import derive_seed, isolated_rng
from .collating import EpisodeCollator
from .episodes import EpisodeSampler, labels_of
from .evaluation import evaluate_episodes, to_device
from .heads import PrototypicalHead
from .mixup import check_mask, latent_mixup_loss
from .model import FewShotModel
from .settings import FewShotConfig


class FewShotTrainer(Trainer):
    """Trains a [`FewShotModel`] on episodes of base classes, https://huggingface.co/papers/2206.03695.

    Every epoch draws new episodes; an interrupted run goes on bit by bit, from any step. Evaluation draws the same
    episodes every time and reports `eval_loss`, `eval_accuracy`, `eval_ci95` and `eval_macro_f1`.

    Args:
        model ([`FewShotModel`], [`EpisodeEncoder`] or [`PreTrainedModel`]): An encoder gets the head that `args` say.
        args ([`FewShotConfig`]): The settings.
        data_collator (`Callable`, *optional*): Collates rows into what the encoder takes, such as
            `DataCollatorWithPadding`; not needed for a [`GraphDataset`].
        train_dataset (`Dataset`, *optional*): Map-style, with labels.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): Likewise.
        train_classes, eval_classes (`Iterable[int]`, *optional*): Labels to draw from; all that occur by default.
        pooling (`str`, *optional*, defaults to `"mean"`): Of a transformers backbone.
        kwargs: Everything else a Trainer takes.

    Raises:
        ValueError: If a class has too few samples, or a setting does not fit the encoder.
    """

    # Attributes the base class sets; declared for the type checker.
    args: FewShotConfig
    control: Any
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: FewShotConfig,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        train_classes: Iterable[int] | None = None,
        eval_classes: Iterable[int] | None = None,
        pooling: str = "mean",
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, FewShotModel):
            with isolated_rng(derive_seed(args.seed, "head")):
                model = FewShotModel.from_encoder(model, pooling, **args.model_settings())
        if args.mixup_weight:
            check_mask(args.mixup_mask, model.encoder.embedding_dim)
            if not isinstance(model.head, PrototypicalHead):
                raise ValueError("latent MixUp needs prototypes, which a matching head has not; set mixup_weight=0.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would split the episodes of a batch; start with `accelerate "
                "launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        self.item_collator = data_collator
        self.eval_classes = None if eval_classes is None else sorted(eval_classes)
        shape = (args.n_way, args.k_shot, args.n_query)
        # Whether these suffice must not come to light after an epoch.
        for part in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if part is not None:
                EpisodeSampler(labels_of(part), *shape, args.eval_episodes, self.eval_classes)
                EpisodeCollator(data_collator, part)
        if args.load_best_model_at_end and isinstance(eval_dataset, dict):
            _check_best(args.metric_for_best_model or "loss", list(eval_dataset))
        sampler, collator = None, None
        if train_dataset is not None:
            sampler = EpisodeSampler(
                labels_of(train_dataset), *shape, args.episodes_per_epoch, train_classes, args.seed
            )
            collator = EpisodeCollator(data_collator, train_dataset)
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=sampler, eval_dataset=eval_dataset, **kwargs
        )
        if args.patience is not None:
            self.add_callback(EarlyStoppingCallback(args.patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Episodes are random already, and by number.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return None if dataset is None else SequentialSampler(dataset)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See [`~transformers.Trainer.train`]; a scale of `"auto"` is set first, from the first episode.

        A support set that the model keeps is dropped, since its embeddings would be those of other weights.
        """
        self.model.forget_support()
        self.calibrate()
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Sets a scale of `"auto"` from the first episode of training, alike on all processes; else does nothing."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not (isinstance(model.head, PrototypicalHead) and model.head.pending):
            return
        training, sampler = model.training, self.train_dataset
        model.eval()
        batch = to_device(self.data_collator([sampler[0]]), next(model.parameters()).device)
        model(batch["items"], batch["index"], batch["k_shot"])
        model.train(training)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy, latent MixUp and the penalty on FiLM's factors, each a mean over the step's episodes."""
        outputs = model(inputs["items"], inputs["index"], inputs["k_shot"])
        loss, plain = outputs.loss, self.accelerator.unwrap_model(model)
        if self.args.mixup_weight:
            loss = loss + self.args.mixup_weight * latent_mixup_loss(
                outputs.query,
                outputs.labels,
                outputs.prototypes,
                plain.head.scale,
                mask=self.args.mixup_mask,
                generator=[torch.Generator().manual_seed(seed) for seed in inputs["seeds"]],
                distance=plain.head.distance,
            )
        if plain.conditioning is not None and self.args.film_weight:
            loss = loss + self.args.film_weight * plain.conditioning.penalty()
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores the model on `eval_episodes` episodes, the same every time and on every process.

        Args:
            eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): Instead of the one given at construction.
            ignore_keys: Has no effect.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Begins every name.

        Returns:
            `dict[str, float]`: `<prefix>_loss`, `<prefix>_accuracy`, `<prefix>_ci95`, `<prefix>_macro_f1` and speeds;
            the name of the data set comes after the prefix where there are several.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs an eval_dataset; pass one here or to the trainer.")
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        args, started = self.args, time.time()
        with isolated_rng():
            scores = evaluate_episodes(
                self.accelerator.unwrap_model(self.model),
                dataset,
                args.n_way,
                args.k_shot,
                args.n_query,
                args.eval_episodes,
                self.eval_classes,
                args.seed,
                self.item_collator,
                args.per_device_eval_batch_size,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=args.eval_episodes)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def _check_best(metric: str, names: list[str]) -> None:
    """Refuse to choose by what evaluation on several data sets will not report, which the Trainer sees an epoch late."""
    if not any(metric.removeprefix("eval_").startswith(f"{name}_") for name in names):
        raise ValueError(
            f"metric_for_best_model is {metric!r}, but with several evaluation sets each has its own; choose one, as "
            f"{f'{names[0]}_loss'!r}."
        )
