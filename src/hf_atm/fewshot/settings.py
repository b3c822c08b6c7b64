"""Settings of few-shot training: a `TrainingArguments` whose batches are episodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from .heads import HEADS, check_scale
from .mixup import MASKS


@dataclass
class FewShotConfig(TrainingArguments):
    """Arguments of [`FewShotTrainer`]; every field parses from the command line, YAML and JSON.

    A batch is made of episodes: `per_device_train_batch_size` is the number of episodes per step and process, an epoch
    is `episodes_per_epoch` of them, and every epoch draws new ones. The defaults that differ from those of
    `TrainingArguments` are the paper's (https://huggingface.co/papers/2206.03695).
    """

    n_way: int = field(default=5, metadata={"help": "Classes per episode. At least 2."})
    k_shot: int = field(default=5, metadata={"help": "Support samples per class. At least 1."})
    n_query: int = field(default=15, metadata={"help": "Query samples per class. At least 1."})
    episodes_per_epoch: int = field(default=2000, metadata={"help": "Training episodes per epoch. At least 1."})
    eval_episodes: int = field(default=500, metadata={"help": "Validation episodes, the same every time."})
    conditioning: bool = field(
        default=False, metadata={"help": "Let the support set scale and shift the encoder's layers (FiLM)."}
    )
    gamma_init: float = field(default=0.0, metadata={"help": "First value of the factor on FiLM's scales."})
    beta_init: float = field(default=1.0, metadata={"help": "First value of the factor on FiLM's shifts."})
    film_weight: float = field(
        default=0.1, metadata={"help": "Weight of the penalty on FiLM's factors; only with `conditioning`."}
    )
    mixup_weight: float = field(default=0.0, metadata={"help": "Weight of latent MixUp; 0 leaves it out."})
    mixup_mask: str = field(
        default="blocks", metadata={"help": "'blocks' (with replacement, as published) or 'exact' shares."}
    )
    head: str = field(default="prototypical", metadata={"help": "'prototypical' or 'matching'."})
    scale: float | str | None = field(
        default=None,
        metadata={"help": "First inverse temperature: a number, or 'auto' from the first episode. 7.5, matching 10."},
    )
    distance: str = field(default="sqeuclidean", metadata={"help": "'sqeuclidean' or 'cosine'."})
    patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better loss, and keep the best."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Episodes per step and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Episodes evaluated at once."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of AdamW."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Clip gradients to this norm."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Schedule of the learning rate."}
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("n_way", 2),
            ("k_shot", 1),
            ("n_query", 1),
            ("episodes_per_epoch", 1),
            ("eval_episodes", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; use a whole number from {least}.")
        for name in ("film_weight", "mixup_weight"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or above.")
        if self.mixup_mask not in MASKS:
            raise ValueError(f"mixup_mask is {self.mixup_mask!r}; known: {', '.join(MASKS)}.")
        if self.mixup_weight and (self.head == "matching"):
            raise ValueError("latent MixUp needs prototypes, which head='matching' has not; set mixup_weight=0.")
        if isinstance(self.scale, str) and self.scale != "auto":
            try:
                self.scale = float(self.scale)
            except ValueError:
                raise ValueError(f"scale is {self.scale!r}; use a number above 0, or 'auto'.") from None
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; known: {', '.join(HEADS)}.")
        if self.scale is not None:
            check_scale(self.scale, self.distance)
        if self.conditioning and self.head == "matching":
            raise ValueError("conditioning needs prototypes, which head='matching' has not; use head='prototypical'.")
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True would repeat the first epoch's episodes; leave it off."
            )
        if self.patience is not None:
            if self.patience < 1:
                raise ValueError(f"patience is {self.patience}; use a whole number from 1.")
            self.load_best_model_at_end = True
            self.metric_for_best_model = getattr(self, "metric_for_best_model", None) or "loss"
        # Rows have their columns chosen by the item collator.
        self.remove_unused_columns = False
        super().__post_init__()

    def model_settings(self) -> dict[str, Any]:
        """The part that [`FewShotModelConfig`] takes."""
        names = ("head", "scale", "distance", "conditioning", "gamma_init", "beta_init")
        return {name: getattr(self, name) for name in names}
