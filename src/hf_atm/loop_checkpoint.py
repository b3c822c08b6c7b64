"""What the loop adds to a checkpoint, and what must be equal for a run to go on from one."""

from __future__ import annotations

from typing import Any

from .checkpoint import load_tensors, load_values, save_state
from .episodic import episode_sizes
from .round_checkpoint import under


_STATE_VERSION = 1
# What the report knows of rounds done and of the round in progress.
_PROGRESS = (
    "records",
    "seconds",
    "segment_loss",
    "round_losses",
    "expert_metrics",
    "expert_scores",
    "base_losses",
    "loss_gaps",
    "searched",
    "merge_record",
)


class ResumableLoop:
    """The part of the loop that is saved and loaded; see [`ATMLoop`]."""

    args: Any
    trainer: Any
    plan: Any
    groups: Any
    rounds: Any
    memory: Any
    diagnostics: Any
    num_examples: dict[str, int]
    datasets: dict[str, Any]
    resume_from: str | None

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to continue bit by bit."""
        args = self.args
        return {
            "tasks": list(self.plan.tasks),
            "num_rounds": args.num_rounds,
            "steps_per_segment": list(self.plan.lengths),
            "head_steps": [args.head_steps, args.head_learning_rate_ratio],
            "num_examples": list(self.num_examples.values()),
            "episodes": episode_sizes(self.datasets),
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "train_sampling_strategy": args.train_sampling_strategy,
            "merge_method": args.merge_method,
            "merge_kwargs": args.merge_kwargs,
            "task_weights": args.task_weights,
            "outer": [args.outer_learning_rate, args.outer_momentum, args.outer_nesterov],
            "max_task_vector_norm": args.max_task_vector_norm,
            "optimizer_policy": args.optimizer_policy,
            "lr_schedule_scope": args.lr_schedule_scope,
            "lora_merge_mode": args.lora_merge_mode,
            "keep_task_vectors": args.keep_task_vectors or args.diagnostics == "full",
            "moment_exponent": args.moment_exponent,
            "task_vector_surgery": args.task_vector_surgery,
            "task_vector_origin": args.task_vector_origin,
            "align_every_round": args.align_every_round,
            "loss_gap_temperature": args.loss_gap_temperature,
            "task_specific_modules": list(args.task_specific_modules),
            "model": self.groups.digest(),
        }

    def check_resume(self, folder: str) -> None:
        """Refuse a checkpoint that this run cannot continue.

        Raises:
            ValueError: listing every setting that differs, as stored and as now.
        """
        stored = load_values(folder)
        now = self.fingerprint()
        then = stored.get("fingerprint", {})
        changed = [
            f"{name}: {then.get(name)!r} -> {value!r}" for name, value in now.items() if then.get(name) != value
        ]
        if stored.get("version") != _STATE_VERSION:
            changed.append(f"state version: {stored.get('version')} -> {_STATE_VERSION}")
        if changed:
            raise ValueError(
                f"{folder} belongs to a different run ({'; '.join(changed)}); restore these settings, or start anew "
                "in another output_dir."
            )

    def _mid_round(self, step: int) -> bool:
        """Whether the weights after `step` steps are one task's, with a base and task vectors beside them."""
        return not self.plan.is_round_end(step) and not self.plan.locate(step).settling

    def save(self, folder: str, step: int) -> None:
        """Write what the Trainer's own checkpoint lacks."""
        position = self.plan.locate(step)
        values, tensors = self.rounds.state(self._mid_round(step))
        names = {id(parameter): name for name, parameter in self.trainer.model.named_parameters()}
        moments, moment_values = self.memory.tensors(names, position.task if position.offset else None)
        tensors |= moments
        measured: dict[str, Any] = {}
        if self.diagnostics is not None:
            measured, sketches = self.diagnostics.state()
            tensors |= sketches
        tensors |= {f"private.{name}": tensor for name, tensor in self.groups.stored_copies().items()}
        content = {
            "version": _STATE_VERSION,
            "fingerprint": self.fingerprint(),
            "global_step": step,
            "rounds": values,
            "moments": moment_values,
            "diagnostics": measured,
            **{name: getattr(self, name) for name in _PROGRESS},
        }
        save_state(folder, content, tensors)

    def _load(self, state: Any) -> None:
        assert self.resume_from is not None
        stored, tensors = load_values(self.resume_from), load_tensors(self.resume_from)
        self.rounds.load(stored["rounds"], tensors, self._mid_round(state.global_step))
        live = dict(self.trainer.model.named_parameters())
        self.memory.load(tensors, stored["moments"], live, self.trainer.optimizer)
        self.groups.load_copies(under(tensors, "private"))
        if self.diagnostics is not None:
            self.diagnostics.load(stored.get("diagnostics", {}), tensors)
        for name in _PROGRESS:
            setattr(self, name, stored[name])

    def _load_best(self, state: Any) -> None:
        """What the Trainer's best weights lack, and the experts of the round that they are from."""
        folder = state.best_model_checkpoint
        tensors = load_tensors(folder)
        self.rounds.load_weights(tensors)
        self.groups.load_copies(under(tensors, "private"))
        if state.best_global_step != state.global_step:
            self.rounds.load_experts({} if self.args.save_only_model else load_values(folder)["rounds"], tensors)
