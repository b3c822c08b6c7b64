"""What the loop asks of the trainer, model and adapter it is mixed into."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from . import checks
from .config import ATMArguments
from .parameters import base_model, has_task_specific


def set_loss_scaling(trainer: Any) -> None:
    """Tell the Trainer whether the model's loss divides by the number of items in the whole accumulated batch."""
    # Many models take **kwargs and ignore num_items_in_batch; believing them would multiply gradients by the
    # accumulation steps. Only the causal language model loss is known to divide by it.
    loss_type = getattr(base_model(trainer.model), "loss_type", None)
    if LOSS_MAPPING.get(loss_type) is not ForCausalLMLoss:
        trainer.model_accepts_loss_kwargs = False


def check_host(cls: type, mixin: type, args: Any) -> None:
    """Refuse trainers that read their data in a way of their own, and settings without the loop's.

    Raises:
        TypeError: naming the method and the class it comes from.
        ValueError: when `args` lacks [`ATMArguments`].
    """
    if not isinstance(args, ATMArguments):
        raise ValueError(
            f"{cls.__name__} needs args with the loop's settings, got {type(args).__name__}; use ATMConfig, or mix "
            "ATMArguments into the host's: `@dataclass class MyConfig(ATMArguments, SFTConfig)`."
        )
    bases = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    for name in ("get_train_dataloader", "_get_train_sampler", "create_scheduler"):
        owner = next((base for base in bases if name in vars(base)), None)
        if owner is not Trainer:
            found = "nothing" if owner is None else owner.__name__
            raise TypeError(
                f"{cls.__name__} cannot run the loop: {name} comes from {found}, not from transformers.Trainer; use a "
                "trainer that reads its data as Trainer does (Trainer, Seq2SeqTrainer, SFTTrainer, DPOTrainer, ...)."
            )


def with_heads(peft_config: PeftConfig, model: Any, args: Any) -> PeftConfig:
    """Let the heads train beside the adapter, unless they are frozen."""
    heads = getattr(base_model(model), "heads", None)
    if args.task_specific_modules and args.lora_merge_mode != "delta":
        raise ValueError(
            f"task_specific_modules beside an adapter need lora_merge_mode='delta', which saves the whole model, not "
            f"{args.lora_merge_mode!r}."
        )
    if heads is None or args.freeze_heads or not hasattr(peft_config, "modules_to_save"):
        return peft_config
    names = [f"heads.{task}" for task in heads]
    return dataclasses.replace(peft_config, modules_to_save=[*(peft_config.modules_to_save or []), *names])


def prepare_model(model: Any, args: Any, tasks: list[str]) -> Any:
    """Give the model what the settings ask of it: private modules, frozen heads.

    Raises:
        ValueError: when the model does not know the tasks, or cannot do what is asked.
    """
    inner = base_model(model)
    known = getattr(getattr(inner, "config", None), "tasks", None)
    if isinstance(known, Mapping) and set(known) != set(tasks):
        checks.check_keys("train_dataset", tasks, list(known))
    if args.task_specific_modules:
        if not has_task_specific(inner):
            raise ValueError(
                f"task_specific_modules needs a model that stores a copy per task, and {type(inner).__name__} does "
                "not; wrap its backbone with MultiTaskModel.from_backbone."
            )
        if isinstance(model, PeftModel):
            raise ValueError(
                "task_specific_modules must be set apart before an adapter is put on; pass the plain model and "
                "peft_config."
            )
        inner.add_task_specific_modules(list(args.task_specific_modules))
    if args.freeze_heads:
        heads = getattr(inner, "heads", None)
        if heads is None:
            raise ValueError(f"freeze_heads=True needs a model with heads, and {type(inner).__name__} has none.")
        heads.requires_grad_(False)
    return model


def release_private(model: Any) -> None:
    """Let private modules learn that an adapter, put on after they were set apart, has frozen.

    Raises:
        ValueError: when the adapter sits on one of them, so that it would be both shared and private.
    """
    inner = base_model(model)
    if not isinstance(model, PeftModel) or not has_task_specific(inner):
        return
    private = set(inner.task_specific_parameter_names())
    for name, parameter in inner.named_parameters():
        if name in private:
            if ".base_layer." in name:
                raise ValueError(
                    f"{name.replace('.base_layer', '')!r} is private by task_specific_modules and a target of the "
                    "adapter; leave it out of target_modules (exclude_modules), or out of task_specific_modules."
                )
            parameter.requires_grad_(True)


def wrap_model_init(model_init: Callable, fit_out: Callable[[Any], Any]) -> Callable:
    """A `model_init` whose models have gone through `fit_out`."""
    takes_trial = bool(inspect.signature(model_init).parameters)

    def prepared(trial: Any = None) -> Any:
        return fit_out(model_init(trial) if takes_trial else model_init())

    return prepared


def settle_jit(callback: JITCheckpointCallback, world_size: int) -> None:
    """Let a checkpoint on SIGTERM happen only where it is complete, and on all processes at once.

    Between backward and optimizer step the dropout masks of the step are already drawn, so a checkpoint there could not
    be resumed bit by bit. With several processes the signal reaches them at different moments, and a checkpoint is a
    collective act: they agree at the end of every step.
    """
    silent = TrainerCallback()
    callback.on_pre_optimizer_step = silent.on_pre_optimizer_step
    if world_size == 1:
        return
    callback.on_step_begin = silent.on_step_begin
    callback.on_epoch_end = silent.on_epoch_end
    save = callback.on_step_end

    def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        manager = callback.jit_manager
        requested = torch.tensor([float(manager.is_checkpoint_requested)], device=args.device)
        torch.distributed.all_reduce(requested, op=torch.distributed.ReduceOp.MAX)
        if not requested.item():
            return None
        manager.is_checkpoint_requested = True
        return save(args, state, control, **kwargs)

    callback.on_step_end = on_step_end
