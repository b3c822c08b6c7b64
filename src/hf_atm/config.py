"""The loop's settings: a dataclass to mix into any TrainingArguments."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from .merging import check_merge_kwargs
from .outer import check_weights
from .surgery import SURGERIES


_CHOICES = {
    "optimizer_policy": ("reset", "keep", "per_task", "per_task_second_moment", "shared"),
    "lr_schedule_scope": ("segment", "run"),
    "lora_merge_mode": ("delta", "svd", "adapter"),
    "task_vector_origin": ("round", "start"),
    "diagnostics": ("off", "cheap", "full"),
    "task_vector_surgery": (None, *SURGERIES),
}
_WEIGHTINGS = ("uniform", "num_examples", "loss_gap")

# Optimizers whose second moments lie open.
_SECOND_MOMENTS = ("adamw_torch", "adamw_torch_fused")

# Optimizers that keep state where clearing `state` does not reach it.
_OUT_OF_REACH_OPTIMIZERS = ("prodigy", "dadapt", "layerwise", "lomo")


@dataclass
class ATMArguments:
    """Settings of alternating tuning and merging (https://huggingface.co/papers/2411.03055).

    Mix it into a host's arguments, mixin first: `@dataclass class ATMSFTConfig(ATMArguments, SFTConfig)`. Every field
    parses from the command line, YAML and JSON with `HfArgumentParser`; dictionaries may be JSON strings.
    """

    num_rounds: int = field(
        default=10,
        metadata={
            "help": "Rounds: each tunes every task once and ends with one merge. At least 1. Replaces num_train_epochs."
        },
    )
    local_epochs: float = field(
        default=1.0,
        metadata={"help": "Epochs each task is tuned within a round; fractions are allowed. Above 0."},
    )
    local_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps per task and round; replaces `local_epochs`. At least 1."}
    )
    head_steps: float = field(
        default=0.0,
        metadata={
            "help": "Of these steps, so many (or, below 1, this fraction) are taken after the merge and train the task's "
            "head and other private modules alone, so that they fit the merged weights. 0 leaves them as tuned."
        },
    )
    head_learning_rate_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of the heads, as a multiple of `learning_rate`. Above 0."}
    )
    merge_method: str = field(default="mean", metadata={"help": "Any name from `hf_atm.list_merge_methods()`."})
    merge_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata={"help": "Parameters of the merge method as a JSON object, such as '{\"density\": 0.2}'."},
    )
    moment_exponent: float = field(
        default=0.0,
        metadata={
            "help": "Weigh each entry of a task vector, within the mean, by this power of AdamW's second moment: 0 is "
            "the plain mean, 0.5 the size of a typical gradient, 1 the diagonal Fisher information. In [0, 1]."
        },
    )
    outer_learning_rate: float | str | None = field(
        default=1.0,
        metadata={
            "help": "Step size of the merge: a number above 0, 'norm' for the data-free scale that gives the merged "
            "update the root-mean-square norm of the task vectors, or 'search' for a line search on the evaluation "
            "data, from there."
        },
    )
    outer_momentum: float = field(
        default=0.0, metadata={"help": "Momentum of the merge step over rounds, in [0, 1). 0 switches it off."}
    )
    outer_nesterov: bool = field(
        default=True, metadata={"help": "Use Nesterov momentum in the merge step; no effect without `outer_momentum`."}
    )
    task_weights: dict | str | None = field(
        default="uniform",
        metadata={
            "help": "'uniform', 'num_examples', 'loss_gap' (tasks that lost most by the last merge, on the evaluation "
            "data, count most), or a JSON object {task: weight} that names every task."
        },
    )
    loss_gap_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of task_weights='loss_gap', in units of the loss; the higher, the more uniform."
        },
    )
    task_vector_surgery: str | None = field(
        default=None,
        metadata={"help": "Take conflicts out of the task vectors before the merge: 'pcgrad' or 'gram_schmidt'."},
    )
    task_vector_origin: str = field(
        default="round",
        metadata={
            "help": "'round' measures task vectors from the round's base, 'start' from where the run began, which the "
            "merge then moves from as well (METIS)."
        },
    )
    align_every_round: bool = field(
        default=False,
        metadata={
            "help": "Before each merge, bring every task's model into the order of units of the round's base (C2M3). Models "
            "tuned from one base have nothing to reorder, so this is for tasks whose units change places. Holds every "
            "task's model, and needs a family that `hf_atm.alignment.spec_for` knows."
        },
    )
    max_task_vector_norm: float | str | None = field(
        default=None,
        metadata={"help": "Clip every task vector to this L2 norm: a number above 0, or 'mean' for the round's mean."},
    )
    optimizer_policy: str = field(
        default="reset",
        metadata={
            "help": "What an optimizer remembers from one segment to the next: 'reset' nothing, 'keep' everything, "
            "'per_task' each task's own moments, 'per_task_second_moment' each task's second moment only, 'shared' what all "
            "tasks' moments were on average at the last merge."
        },
    )
    full_batch: bool = field(
        default=False,
        metadata={
            "help": "Accumulate a whole local epoch into one optimizer step: exact gradient descent. All tasks "
            "must have the same number of examples; gradient_accumulation_steps is set to fit when it is 1."
        },
    )
    lr_schedule_scope: str = field(
        default="segment",
        metadata={"help": "'segment' restarts the learning rate schedule with each task, 'run' spans all rounds."},
    )
    lora_merge_mode: str = field(
        default="delta",
        metadata={
            "help": "'delta' adds the exact merged update to the base weights, 'svd' compresses it back into the "
            "adapter's rank, 'adapter' merges A and B as if they were weights."
        },
    )
    freeze_heads: bool = field(
        default=False, metadata={"help": "Keep the heads as given (zero-shot text heads) instead of training them."}
    )
    task_specific_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Name patterns of parameters each task keeps to itself, never merged (heads always are)."},
    )
    task_parallel: bool = field(
        default=False, metadata={"help": "Reserved: tasks spread over processes. Not available yet."}
    )
    task_vector_device: str = field(
        default="cpu", metadata={"help": "Device that holds the round's base and task vectors."}
    )
    keep_task_vectors: bool = field(
        default=False,
        metadata={
            "help": "Hold every task vector until the merge even where a running sum would do: exact cosines and "
            "`trainer.task_vectors`, for one more copy of the weights per task."
        },
    )
    eval_experts: bool = field(
        default=False,
        metadata={"help": "Evaluate each tuned model on its own task before the merge (needs `eval_dataset`)."},
    )
    diagnostics: str = field(
        default="cheap",
        metadata={
            "help": "What is measured at each merge, for the report and trackers: 'off' norms and cosines alone; "
            "'cheap' also moves, their persistence, and gradients, from sketches of 1 MB; 'full' also signs, singular "
            "vectors and loss barriers, which holds every task vector and takes as long as a few merges and, with an "
            "`eval_dataset`, three evaluations."
        },
    )
    round_table: bool = field(default=True, metadata={"help": "Print a table of scores at each round's end."})

    def __post_init__(self) -> None:
        for name in ("merge_kwargs", "task_weights"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, json.loads(value))
        if isinstance(self.merge_kwargs, str):
            raise ValueError(
                f"merge_kwargs is {self.merge_kwargs!r}; give a JSON object such as '{{\"density\": 0.2}}'."
            )
        self.merge_kwargs = check_merge_kwargs(self.merge_method, self.merge_kwargs or {})
        self.task_weights = self.task_weights or "uniform"
        self.outer_learning_rate = _number_or("outer_learning_rate", self.outer_learning_rate, "norm", "search") or 1.0
        self.max_task_vector_norm = _number_or("max_task_vector_norm", self.max_task_vector_norm, "mean")
        self._check_fields()
        # One epoch of the Trainer is one round; whatever the host counts in epochs, it counts in rounds.
        self.num_train_epochs = float(self.num_rounds)
        host_post_init = getattr(super(), "__post_init__", None)
        if host_post_init is not None:
            host_post_init()
            check_host_arguments(self)

    def _check_fields(self) -> None:
        for name, minimum in (("num_rounds", 1), ("local_steps", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {minimum}.")
        if not (self.local_epochs > 0 and math.isfinite(self.local_epochs)):
            raise ValueError(f"local_epochs is {self.local_epochs}; it must be above 0.")
        if not (self.head_learning_rate_ratio > 0 and math.isfinite(self.head_learning_rate_ratio)):
            raise ValueError(f"head_learning_rate_ratio is {self.head_learning_rate_ratio}; it must be above 0.")
        steps = self.head_steps
        if not (0 <= steps and math.isfinite(steps)) or steps > 1 and steps != int(steps):
            raise ValueError(
                f"head_steps is {self.head_steps}; give a whole number of steps, or a fraction of them below 1."
            )
        if self.head_steps and self.freeze_heads and not self.task_specific_modules:
            raise ValueError(
                f"head_steps={self.head_steps} trains heads, and freeze_heads=True keeps them as they are; drop one."
            )
        if self.head_steps and self.full_batch:
            raise ValueError(
                f"full_batch makes each segment one optimizer step; head_steps={self.head_steps} must be 0."
            )
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"outer_momentum is {self.outer_momentum}; it must lie in [0, 1).")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, choices))}.")
        if isinstance(self.task_weights, dict):
            check_weights(self.task_weights)
        elif self.task_weights not in _WEIGHTINGS:
            raise ValueError(
                f"task_weights is {self.task_weights!r}; use {', '.join(map(repr, _WEIGHTINGS))} or {{task: weight}}."
            )
        if not (self.loss_gap_temperature > 0 and math.isfinite(self.loss_gap_temperature)):
            raise ValueError(f"loss_gap_temperature is {self.loss_gap_temperature}; it must be above 0.")
        if not 0 <= self.moment_exponent <= 1:
            raise ValueError(f"moment_exponent is {self.moment_exponent}; it must lie in [0, 1].")
        if self.moment_exponent and (
            self.merge_method not in ("mean", "linear") or "normalize" in (self.merge_kwargs or {})
        ):
            raise ValueError(
                f"moment_exponent={self.moment_exponent} makes a weighted mean, so merge_method must be 'mean', not "
                f"{self.merge_method!r} with {self.merge_kwargs}."
            )
        if self.moment_exponent and self.optimizer_policy == "keep":
            raise ValueError(
                f"moment_exponent={self.moment_exponent} weighs by each task's own gradients, and optimizer_policy='keep' "
                "mixes those of all tasks; use 'reset' or 'per_task'."
            )
        if self.task_vector_origin == "start" and self.outer_momentum:
            raise ValueError(
                f"outer_momentum={self.outer_momentum} adds up moves between rounds, and task_vector_origin='start' "
                "replaces them; set outer_momentum=0."
            )
        if not isinstance(self.align_every_round, bool):
            raise ValueError(f"align_every_round is {self.align_every_round!r}; choose True or False.")
        if self.align_every_round and self.optimizer_policy != "reset":
            raise ValueError(
                f"optimizer_policy={self.optimizer_policy!r} keeps moments in the order that a task's units had, which "
                "align_every_round=True may change; use optimizer_policy='reset'."
            )
        if self.task_parallel:
            raise ValueError("task_parallel=True is not available yet; leave it off and tasks take turns.")
        if self.full_batch and self.local_steps is not None:
            raise ValueError(
                f"full_batch makes each segment one optimizer step, so local_steps={self.local_steps} contradicts it; "
                "leave local_steps unset."
            )
        if self.full_batch and self.local_epochs != 1:
            raise ValueError(f"full_batch accumulates one whole epoch; local_epochs={self.local_epochs} must be 1.")


@dataclass
class ATMConfig(ATMArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings of the loop."""


def check_host_arguments(args: Any) -> None:
    """Refuse, in one sentence each, the Trainer's options that would break the plan of rounds.

    Raises:
        ValueError: naming the option, its value and the way out.
    """
    accelerator = args.accelerator_config
    optimizer = str(getattr(args.optim, "value", args.optim)).lower()
    refused: list[tuple[bool, str]] = [
        (args.max_steps > 0, f"max_steps={args.max_steps} would cut a round; set num_rounds and local_steps instead"),
        (bool(args.deepspeed), "DeepSpeed keeps its own copy of the weights and would not see a merge; run on DDP"),
        (bool(args.fsdp), "FSDP shards the weights that a merge rewrites, which is not supported yet; run on DDP"),
        (args.auto_find_batch_size, "auto_find_batch_size changes the plan of steps; choose a batch size"),
        (
            args.train_sampling_strategy not in ("random", "sequential"),
            f"train_sampling_strategy={args.train_sampling_strategy!r} reorders examples across tasks; use 'random' "
            "or 'sequential'",
        ),
        (
            args.dataloader_persistent_workers,
            "dataloader_persistent_workers=True would freeze the data order at the first round; leave it off",
        ),
        (args.ignore_data_skip, "ignore_data_skip=True would resume a round with the wrong task's data; leave it off"),
        (getattr(accelerator, "split_batches", False), "accelerator_config.split_batches=True is not supported"),
        (bool(getattr(accelerator, "dispatch_batches", None)), "accelerator_config.dispatch_batches is not supported"),
        (
            args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY),
            f"lr_scheduler_type={args.lr_scheduler_type} follows an evaluation, not the step; choose another schedule",
        ),
        (
            args.optimizer_policy != "keep" and any(name in optimizer for name in _OUT_OF_REACH_OPTIMIZERS),
            f"optim={optimizer} keeps state that optimizer_policy={args.optimizer_policy!r} cannot reach; use "
            "optimizer_policy='keep' or another optimizer",
        ),
        (
            args.moment_exponent > 0 and optimizer not in _SECOND_MOMENTS,
            f"moment_exponent={args.moment_exponent} needs AdamW's second moments, and optim={optimizer} keeps none "
            f"as they are; use {' or '.join(_SECOND_MOMENTS)}",
        ),
        (
            "schedule_free" in optimizer,
            f"optim={optimizer} keeps a second copy of the weights that a merge would not reach; choose another "
            "optimizer",
        ),
        (
            args.load_best_model_at_end and args.eval_strategy != IntervalStrategy.EPOCH,
            "load_best_model_at_end needs eval_strategy='epoch' (once per round), since a step inside a round holds "
            "one task's weights",
        ),
        (
            args.save_strategy == SaveStrategy.BEST and args.eval_strategy != IntervalStrategy.EPOCH,
            "save_strategy='best' needs eval_strategy='epoch' (once per round)",
        ),
        (args.batch_eval_metrics, "batch_eval_metrics=True is not supported; leave it off"),
    ]
    for wrong, reason in refused:
        if wrong:
            raise ValueError(f"{reason}.")


def _number_or(name: str, value: float | str | None, *words: str) -> float | str | None:
    if value is None or value in words:
        return value
    choices = " or ".join(map(repr, words))
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; use a number above 0 or {choices}.") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} is {value!r}; it must be above 0, or {choices}.")
    return number
