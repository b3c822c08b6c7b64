"""Alternating tuning and merging inside a Trainer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import datasets as hf_datasets
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from . import checkpoint, checks
from .callbacks import LastWordCallback, RoundCallback
from .data import TaskCollator, TaskDataset
from .episodic import refresh_tasks
from .evaluation import EvaluationMixin, TaskMetrics
from .hosts import (
    check_host,
    prepare_model,
    release_private,
    set_loss_scaling,
    settle_jit,
    with_heads,
    wrap_model_init,
)
from .learning_rate import set_head_rates
from .loop import ATMLoop
from .parameters import base_model
from .saving import SavingMixin
from .seeding import derive_seed, isolated_rng


_OTHER_TRAIN_SETS = "train/"


class ATMMixin(SavingMixin, EvaluationMixin):
    """Turns a Trainer into one that alternates tuning and merging; put it first among the bases.

    One call of `train()` is the whole run, one epoch is one round, one contiguous block of steps is one task. Works
    with any trainer whose `get_train_dataloader`, `_get_train_sampler` and `create_scheduler` are `Trainer`'s own:
    `class ATMSFTTrainer(ATMMixin, SFTTrainer)` with `@dataclass class ATMSFTConfig(ATMArguments, SFTConfig)`.

    Args:
        model: as the host takes it; a [`MultiTaskModel`], or a model without heads (every task is a data set).
        args: the host's arguments with [`ATMArguments`] mixed in.
        data_collator (`Callable` or `dict[str, Callable]`, *optional*): one for all tasks, or one per task.
        train_dataset (`dict[str, Dataset]`): a map-style data set per task.
        eval_dataset (`dict[str, Dataset]`, *optional*): likewise.
        processing_class (*optional*): as the host takes it.
        compute_metrics (`Callable` or `dict[str, Callable]`, *optional*): one for all tasks, or one per task; the
            first metric each returns is what averages are made of.
        peft_config (`PeftConfig`, *optional*): trains an adapter instead of all weights; heads are added to it.
        kwargs: everything else the host takes.

    Raises:
        ValueError: in one sentence, for whatever would fail or mislead later.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable | Mapping[str, Callable] | None = None,
        train_dataset: Mapping[str, Any] | None = None,
        eval_dataset: Mapping[str, Any] | None = None,
        processing_class: Any = None,
        *,
        compute_metrics: Callable | Mapping[str, Callable] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_host(type(self), ATMMixin, args)
        train_sets = checks.check_datasets("train_dataset", train_dataset)
        tasks = sorted(train_sets)
        eval_sets = {} if eval_dataset is None else checks.check_datasets("eval_dataset", eval_dataset)
        for name, value in (
            ("eval_dataset", eval_sets or None),
            ("compute_metrics", compute_metrics),
            ("data_collator", data_collator),
        ):
            if isinstance(value, Mapping):
                checks.check_keys(name, value, tasks)
        checks.check_validation(args, eval_sets)
        if getattr(args, "eval_packing", None) not in (None, getattr(args, "packing", None)):
            raise ValueError("eval_packing must equal packing, since the host prepares all data sets alike.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process mean nn.DataParallel, whose replicas would not see a merge; start "
                "with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        host_adapts = "peft_config" in inspect.signature(super().__init__).parameters

        def fit_out(plain: Any) -> Any:
            """Check a model against the data and give it what the settings ask for."""
            plain = prepare_model(plain, args, tasks)
            checks.check_labels(base_model(plain), "train_dataset", train_sets)
            checks.check_labels(base_model(plain), "eval_dataset", eval_sets)
            if peft_config is None or host_adapts:
                return plain
            # The adapter's first values follow from the seed alone, on every process alike.
            with isolated_rng(derive_seed(args.seed, "adapter")):
                return get_peft_model(plain, with_heads(peft_config, plain, args))

        if kwargs.get("model_init") is not None:
            kwargs["model_init"] = wrap_model_init(kwargs["model_init"], fit_out)
        elif not isinstance(model, str):
            model = fit_out(model)
        if peft_config is not None and host_adapts:
            kwargs["peft_config"] = with_heads(peft_config, model, args)
        if args.full_batch and args.gradient_accumulation_steps == 1:
            per_step = args.per_device_train_batch_size * args.world_size
            args.gradient_accumulation_steps = max(1, len(train_sets[tasks[0]]) // per_step)
        metrics = None if compute_metrics is None else TaskMetrics(compute_metrics)
        # A host prepares one training set and a dictionary of evaluation sets; the other training sets ride along.
        prepared = {f"{_OTHER_TRAIN_SETS}{task}": train_sets[task] for task in tasks[1:]} | eval_sets
        super().__init__(  # type: ignore[call-arg]
            model=model,
            args=args,
            data_collator=None if isinstance(data_collator, Mapping) else data_collator,
            train_dataset=train_sets[tasks[0]],
            eval_dataset=prepared or None,
            processing_class=processing_class,
            compute_metrics=metrics,
            **kwargs,
        )
        self._join(tasks, data_collator)

    #: What happens at the boundaries of segments and rounds.
    loop_class: type[ATMLoop] = ATMLoop

    # Attributes the host sets; declared for the type checker.
    model: Any
    args: Any
    state: TrainerState

    def _join(self, tasks: list[str], data_collator: Any) -> None:
        """Take the prepared data sets apart again and put the loop in place."""
        host: Any = self
        prepared = host.eval_dataset or {}
        train_sets = {tasks[0]: host.train_dataset}
        train_sets |= {task: prepared[f"{_OTHER_TRAIN_SETS}{task}"] for task in tasks[1:]}
        eval_sets = {task: prepared[task] for task in tasks if task in prepared}
        host.eval_dataset = {task: self._as_task(task, dataset) for task, dataset in eval_sets.items()} or None
        host._set_signature_columns_if_needed()
        release_private(self.model)
        forward = inspect.signature(base_model(self.model).forward).parameters
        host.data_collator = TaskCollator(
            host.data_collator,
            data_collator if isinstance(data_collator, Mapping) else None,
            add_task="task" in forward,
            columns=host._signature_columns if self.args.remove_unused_columns else None,
        )
        host.is_in_train = False
        self.atm = self.loop_class(self, {task: self._without_unused(dataset) for task, dataset in train_sets.items()})
        handler = host.callback_handler
        handler.callbacks.insert(0, RoundCallback(self.atm))
        handler.callbacks.append(LastWordCallback(self.atm))
        for callback in handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):
                settle_jit(callback, self.args.world_size)
        self._written: set[str] = set()
        self._staging: str | None = None

    def _without_unused(self, dataset: Any) -> Any:
        # A transform may need columns that the model does not; the collator drops those once it has run.
        if isinstance(dataset, hf_datasets.Dataset) and dataset.format["type"] != "custom":
            return self._remove_unused_columns(dataset, description="training")  # type: ignore[attr-defined]
        return dataset

    def _as_task(self, task: str, dataset: Any) -> TaskDataset:
        return dataset if isinstance(dataset, TaskDataset) else TaskDataset(self._without_unused(dataset), task)

    # ---- What a user asks for ----

    @property
    def round(self) -> int:
        """0-based round of the next optimizer step."""
        return self.atm.plan.locate(self.state.global_step).round

    @property
    def report(self) -> list[dict[str, Any]]:
        """One record per finished round, as in `atm_report.json`."""
        return self.atm.records

    @property
    def base_state(self) -> dict[str, torch.Tensor]:
        """The round's base by parameter name, float32; empty before training."""
        return dict(getattr(self.atm.rounds, "base", {}))

    @property
    def task_vectors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """This round's finished task vectors, by task and parameter name, float32.

        Raises:
            RuntimeError: when they were added up as they came; `keep_task_vectors=True` keeps them.
        """
        if self.atm.rounds.streaming:
            raise RuntimeError(
                f"merge_method={self.args.merge_method!r} keeps a running sum of the task vectors; set "
                "keep_task_vectors=True to hold each of them."
            )
        return dict(self.atm.rounds.vectors)

    def add_task(
        self,
        name: str,
        train_dataset: Any,
        eval_dataset: Any = None,
        compute_metrics: Callable | None = None,
        data_collator: Callable | None = None,
    ) -> None:
        """Add a task before the next call of `train()`; a [`MultiTaskModel`] gets its head first, with its `add_task`.

        Args:
            name (`str`): the new task.
            train_dataset (`Dataset`): its examples, prepared as the model takes them.
            eval_dataset (`Dataset`, *optional*): needed when the other tasks have one.
            compute_metrics, data_collator (`Callable`, *optional*): needed when the other tasks have one each.

        Raises:
            RuntimeError: during `train()`, whose plan is fixed.
            ValueError: when something is missing or does not fit; nothing has changed then.
        """
        host: Any = self
        if host.is_in_train:
            raise RuntimeError("add_task during train() would change the plan of a run under way; call it after.")
        if isinstance(self.model, PeftModel):
            raise ValueError("add_task cannot give an adapter another head yet; start a new trainer.")
        if name in self.atm.datasets:
            raise ValueError(f"There is a task {name!r} already; choose another name.")
        heads = getattr(self.model, "heads", None)
        if heads is not None and name not in heads:
            raise ValueError(f"The model has no head for {name!r}; call model.add_task({name!r}, ...) first.")
        checks.check_datasets("train_dataset", {name: train_dataset})
        checks.check_labels(self.model, "train_dataset", {name: train_dataset})
        functions = None if host.compute_metrics is None else host.compute_metrics.functions
        for argument, value, needed in (
            ("eval_dataset", eval_dataset, host.eval_dataset is not None),
            ("compute_metrics", compute_metrics, isinstance(functions, Mapping)),
            ("data_collator", data_collator, bool(host.data_collator.collators)),
        ):
            if (value is not None) != needed:
                raise ValueError(f"Task {name!r} must have its own {argument} exactly when the other tasks do.")
        if eval_dataset is not None:
            checks.check_datasets("eval_dataset", {name: eval_dataset})
            checks.check_labels(self.model, "eval_dataset", {name: eval_dataset})
        self.atm.add_dataset(name, self._without_unused(train_dataset))
        if isinstance(functions, Mapping):
            host.compute_metrics.functions = {**functions, name: compute_metrics}
        if data_collator is not None:
            host.data_collator.collators[name] = data_collator
        if eval_dataset is not None:
            host.eval_dataset = dict(sorted({**host.eval_dataset, name: self._as_task(name, eval_dataset)}.items()))
        # The optimizer, and DDP's wrapper, must learn of the new head.
        host.optimizer, host.model_wrapped = None, host.model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Run all rounds; see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder, or `True` for the last
                complete one in `output_dir`. Continues bit by bit, from any step.

        Raises:
            ValueError: when the checkpoint belongs to a different run, or `output_dir` already holds one.
            DivergenceError: when a loss or task vector becomes NaN or infinite; the model then holds the last merged
                weights.
        """
        folder = self._resolve_resume(resume_from_checkpoint, searching=bool(args[0] if args else kwargs.get("trial")))
        self.atm.plan_run()
        if folder is not None:
            self.atm.check_resume(folder)
        self.atm.resume_from = folder
        self._written.add(self.args.output_dir)
        try:
            return super().train(folder, *args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.atm.interrupt()
            raise

    def _resolve_resume(self, resume: str | bool | None, searching: bool) -> str | None:
        output_dir = self.args.output_dir
        if resume is None or resume is False:
            traces = checkpoint.traces_of_a_run(output_dir)
            if traces and not searching and output_dir not in self._written:
                raise ValueError(
                    f"output_dir {output_dir!r} holds another run ({', '.join(traces[:3])}); pass "
                    "resume_from_checkpoint=True to continue it, or choose another folder."
                )
            return None
        if self.args.should_save:
            checkpoint.recover(output_dir)
        self.args.distributed_state.wait_for_everyone()
        if resume is not True:
            return str(resume)
        found = checkpoint.checkpoints(output_dir)
        if not found:
            raise ValueError(
                f"output_dir {output_dir!r} holds no complete checkpoint to resume from; start without "
                "resume_from_checkpoint, or name another folder."
            )
        return found[-1]

    # ---- What the host calls ----

    def get_train_dataloader(self) -> DataLoader:
        self.atm.plan_run()
        return self._get_dataloader(  # type: ignore[attr-defined]
            self.atm.round_dataset,
            "Training",
            self._train_batch_size,  # type: ignore[attr-defined]
            sampler_fn=SequentialSampler,
            is_training=True,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        host: Any = self
        if host.lr_scheduler is None:
            optimizer = host.optimizer if optimizer is None else optimizer
            if self.args.head_learning_rate_ratio != 1:
                heads = [p for head in self.atm.groups.heads.values() for p in head.values()]
                set_head_rates(optimizer, heads, self.args.head_learning_rate_ratio)
            host.lr_scheduler = LambdaLR(optimizer, self.atm.rates())
            host._created_lr_scheduler = True
        elif self.args.head_learning_rate_ratio != 1 and not host._created_lr_scheduler:
            raise ValueError(
                f"head_learning_rate_ratio={self.args.head_learning_rate_ratio} sets up the schedule's groups, and a "
                "scheduler was passed to the trainer; give heads a group of their own in your optimizer instead."
            )
        return host.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        host: Any = self
        if "loss" in logs and host.is_in_train and not self.atm.scoring:
            self.atm.describe(logs, self.state.global_step)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return getattr(self, "_staging", None) or super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir, step = self._get_output_dir(trial), self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        writes = self.args.should_save
        refresh_tasks(self)
        barrier = self.args.distributed_state.wait_for_everyone
        with checkpoint.staged_checkpoint(run_dir, name, writes, barrier) as staging:
            self._staging = staging
            try:
                folder = os.path.join(staging, name)
                if writes and not self.args.save_only_model:
                    self.atm.save(folder, step)
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._staging = None
            if self.state.best_global_step:
                best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
                if self.state.best_global_step == step or os.path.isdir(best):
                    self.state.best_model_checkpoint = best
                if writes:
                    self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, name))
        if writes:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


class ATMTrainer(ATMMixin, Trainer):
    """[`~transformers.Trainer`] that alternates tuning and merging; see [`ATMMixin`] for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_loss_scaling(self)


class ATMSeq2SeqTrainer(ATMMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] that alternates tuning and merging; see [`ATMMixin`] for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_loss_scaling(self)
