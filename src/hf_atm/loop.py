"""The loop's state inside a Trainer: what happens at the boundaries of segments and rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from accelerate.utils import broadcast
from torch import Tensor
from transformers import Trainer

from .callbacks import ATMCallback
from .data import RoundDataset, head_step_counts, segment_length
from .episodic import expert_prototypes, refresh_tasks, with_episodes
from .learning_rate import learning_rate_multiplier
from .loop_checkpoint import ResumableLoop
from .loop_diagnostics import RoundDiagnostics
from .loop_report import LoopReport, round_scalars
from .lora import check_adapter_setup
from .merge_report import DivergenceError, MergeReport
from .moment_weights import check_second_moments, entry_weights
from .moments import OptimizerMemory
from .outer import OuterOptimizer, loss_gap_weights, task_weights
from .parameters import ParameterGroups
from .realignment import Realignment
from .rounds import RoundState
from .schedule import Position, RoundPlan, Segment
from .seeding import derive_seed, seed_everything


class ATMLoop(LoopReport, ResumableLoop):
    """Everything alternating tuning and merging keeps beside the Trainer.

    Args:
        trainer: the host trainer, fully constructed.
        datasets (`Mapping[str, Sequence]`): prepared training data per task.
    """

    #: Whether tasks are tuned apart and merged.
    merging = True

    def __init__(self, trainer: Any, datasets: Mapping[str, Sequence]) -> None:
        self.trainer = trainer
        # Sorted, so that the order in which a user writes the tasks down changes nothing.
        self.datasets = self._as_read(datasets)
        self.records: list[dict[str, Any]] = []
        self.resume_from: str | None = None
        self.scoring = False
        self.running = False
        #: Whether prototypes stay as they are, whatever is evaluated or saved.
        self.prototypes_held = False
        self._reset_progress()
        self.plan_run()
        self._set_up()

    # ---- Setting up ----

    @property
    def args(self) -> Any:
        return self.trainer.args

    def _as_read(self, datasets: Mapping[str, Any]) -> dict[str, Any]:
        """Training data as steps read it."""
        return with_episodes(self.trainer.model, dict(sorted(datasets.items())))

    def plan_run(self) -> None:
        """Lay out rounds, segments and data from the arguments as they are now."""
        args = self.args
        args.num_train_epochs = float(args.num_rounds)
        self.global_batch = self.trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.num_examples = {task: len(dataset) for task, dataset in self.datasets.items()}
        lengths = {
            task: segment_length(
                task, size, self.global_batch, args.local_epochs, args.local_steps, args.dataloader_drop_last
            )
            for task, size in self.num_examples.items()
        }
        if args.full_batch:
            self._check_full_batch()
        self.plan, self.round_dataset = self._lay_out(lengths)

    def _lay_out(self, lengths: dict[str, int]) -> tuple[RoundPlan, RoundDataset]:
        """The plan, and the data in its order, from the optimizer steps per task and round."""
        head_steps = head_step_counts(lengths, self.args.head_steps)
        tuning = tuple(length - head_steps[task] for task, length in lengths.items())
        plan = RoundPlan(tuple(lengths), tuning, self.args.num_rounds, tuple(head_steps.values()))
        return plan, RoundDataset(self.datasets, plan, self.global_batch, self.data_seed, self.shuffle)

    @property
    def data_seed(self) -> int:
        """Decides the order of examples."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def shuffle(self) -> bool:
        """Whether the order of examples is drawn anew in every epoch."""
        return self.args.train_sampling_strategy != "sequential"

    def rates(self) -> Callable[[int], float]:
        """The factor on the learning rate at each global step."""
        return learning_rate_multiplier(self.plan, self.args)

    def _check_full_batch(self) -> None:
        for task, size in self.num_examples.items():
            if size != self.global_batch:
                raise ValueError(
                    f"full_batch needs every task to fill one optimizer step exactly: task {task!r} has {size} "
                    f"examples and a step takes {self.global_batch}; give all tasks the same number of examples and "
                    "set gradient_accumulation_steps to that number / (per_device_train_batch_size x processes)."
                )

    def _set_up(self) -> None:
        """Group the model's parameters and prepare the round; refuses what cannot be merged exactly."""
        args, model = self.args, self.trainer.model
        self.groups = ParameterGroups(model, list(self.plan.tasks), self.merging)
        without = [task for task in self.plan.tasks if not self.groups.has_private(task)]
        if self.plan.settles and without:
            raise ValueError(
                f"head_steps={args.head_steps} trains what belongs to one task alone, and task {without[0]!r} has "
                "no head or other private module that learns; set head_steps=0."
            )
        space = self.groups.space(args.lora_merge_mode, args.task_vector_device)
        check_adapter_setup(self.trainer, space, bool(self.groups.statistics()))
        self.rounds = RoundState(
            space,
            list(self.plan.tasks),
            task_weights(args.task_weights, self.num_examples),
            args.merge_method,
            args.merge_kwargs,
            OuterOptimizer(args.outer_learning_rate, args.outer_momentum, args.outer_nesterov),
            args.max_task_vector_norm,
            args.keep_task_vectors,
            self.groups.statistics(),
            surgery=args.task_vector_surgery,
            seed=args.seed,
            anchored=args.task_vector_origin == "start",
            hold=args.task_weights == "loss_gap" or args.diagnostics == "full" or args.align_every_round,
            entrywise=args.moment_exponent > 0,
        )
        self.realignment = None
        if args.align_every_round and self.merging:
            self.realignment = Realignment(model, self.groups, args.seed)
        self.memory = OptimizerMemory(args.optimizer_policy, self.groups.shared.values())
        self.diagnostics = None
        if args.diagnostics != "off" and self.merging:
            self.diagnostics = RoundDiagnostics(args.diagnostics, space, self.groups.shared, self.rounds.anchored)

    def _reset_progress(self) -> None:
        self.seconds = {"tuning": 0.0, "merging": 0.0, "searching": 0.0, "evaluating": 0.0}
        self.segment_loss = [0.0, 0.0]
        self.round_losses: dict[str, float] = {}
        self.expert_metrics: dict[str, dict[str, float]] = {}
        self.expert_scores: dict[str, float] = {}
        self.base_losses: dict[str, float] = {}
        self.loss_gaps: dict[str, float] = {}
        self.searched = 0
        self.merge_record: dict[str, Any] = {}

    def add_dataset(self, task: str, dataset: Any) -> None:
        """Take in another task between runs; nothing changes when it does not fit."""
        before = self.datasets
        added = with_episodes(self.trainer.model, {task: dataset})
        self.datasets = dict(sorted({**before, **added}.items()))
        try:
            self.plan_run()
            self._set_up()
        except Exception:
            self.datasets = before
            self.plan_run()
            self._set_up()
            raise

    def count_evaluation(self, seconds: float) -> None:
        """Book wall time spent on evaluation."""
        self.seconds["evaluating"] += seconds

    def measure_losses(self, tasks: Sequence[str]) -> dict[str, float]:
        """Validation losses of the live model, for the loop's own decisions; their cost is booked as such."""
        evaluating = self.seconds["evaluating"]
        losses = self.trainer.validation_losses(tasks)
        self.seconds["searching"] += self.seconds["evaluating"] - evaluating
        self.seconds["evaluating"] = evaluating
        self.searched += sum(len(self.trainer.eval_dataset[task]) for task in tasks)
        return losses

    # ---- Events ----

    def begin_training(self, state: Any) -> None:
        self._set_up()
        self._reset_progress()
        self._last_logged = state.global_step
        if self.args.moment_exponent:
            check_second_moments(self.trainer.optimizer)
        if self.resume_from is not None:
            self._load(state)
        else:
            self.records = []
            refresh_tasks(self.trainer)
            self.rounds.open()
        self.resume_from = None
        self.running = True
        finished = state.global_step == self.plan.total_steps
        position = self.plan.locate(state.global_step - 1 if finished else state.global_step)
        self._open_segment(position)

    def begin_step(self, state: Any, control: Any) -> Any:
        position = self.plan.locate(state.global_step)
        if position.offset:
            return control
        if position.task == self.plan.tasks[0] and not position.settling:
            self.round_losses = {}
            if self.args.task_weights == "loss_gap":
                self.base_losses = self.measure_losses(self.plan.tasks)
            control = self.emit("on_round_begin", state, control, round=position.round)
        # Each segment draws from its own stream: what a task sees does not depend on the tasks before it.
        settling = ("settling",) if position.settling else ()
        seed_everything(derive_seed(self.args.seed, position.round, position.task, self.args.process_index, *settling))
        self.memory.begin(self.trainer.optimizer, position.task)
        self._open_segment(position)
        if position.settling:
            return control
        return self.emit("on_task_begin", state, control, round=position.round, task=position.task)

    def _open_segment(self, position: Position) -> None:
        self.groups.activate(position.task)
        self.groups.train_shared(not position.settling)
        self.private_backup = self.groups.private_values(position.task)
        self._segment_clock = perf_counter()
        self._evaluating_before = self.seconds["evaluating"]

    def before_optimizer_step(self, state: Any) -> None:
        """Gradients are complete, and clipped, and not yet used."""
        position = self.plan.locate(state.global_step)
        if self.diagnostics is not None and not position.settling:
            self.diagnostics.add_step(position.task, self.trainer.optimizer)

    def end_step(self, state: Any, control: Any) -> Any:
        segment = self.plan.closed_by(state.global_step)
        if segment is None:
            return control
        evaluating = self.seconds["evaluating"] - self._evaluating_before
        self.seconds["tuning"] += perf_counter() - self._segment_clock - evaluating
        if segment.settling:
            self.memory.end(self.trainer.optimizer, segment.task, settling=True)
            self.groups.train_shared(True)
        else:
            control = self._close_tuning(segment, state, control)
        self._synchronise_schedule(state.global_step)
        if self.plan.is_round_end(state.global_step):
            control = self._close_round(state, control)
        if self.args.logging_strategy != "no":
            # A logged loss never averages two tasks.
            control.should_log = True
        return control

    def _close_tuning(self, segment: Segment, state: Any, control: Any) -> Any:
        """Take the task vector, and merge after the last task."""
        task = segment.task
        if self.args.eval_experts:
            self.expert_metrics[task], self.expert_scores[task] = self.trainer.evaluate_expert(task)
        if self.args.task_weights == "loss_gap":
            self.loss_gaps[task] = self.base_losses[task] - self.measure_losses([task])[task]
        clock, aside = perf_counter(), self.seconds["searching"] + self.seconds["evaluating"]
        if self.args.world_size > 1:
            for buffer in self.rounds.statistics.values():
                buffer.copy_(broadcast(buffer.clone()))
        try:
            norm = self.rounds.capture(task, self._entry_weights())
            control = self.emit("on_task_end", state, control, round=segment.round, task=task, task_vector_norm=norm)
            self.memory.end(self.trainer.optimizer, task)
            if self.rounds.space.compact:
                # What the merged model's head will not have: values before it settled, prototypes of these weights.
                settled = self.groups.head_values(task) if self.plan.settles else {}
                self.rounds.heads[task] = settled | expert_prototypes(self.trainer, task)
            if self.plan.is_merge(state.global_step):
                self.merge_record = self._merge(segment.round).to_dict()
                self.memory.merge()
            else:
                self.rounds.restore()
        except DivergenceError as error:
            raise self._undo(error) from None
        aside = self.seconds["searching"] + self.seconds["evaluating"] - aside
        self.seconds["merging"] += perf_counter() - clock - aside
        return control

    def _entry_weights(self) -> dict[str, Tensor] | None:
        args = self.args
        if not args.moment_exponent:
            return None
        return entry_weights(self.trainer.optimizer, self.groups.shared, args.moment_exponent, args.task_vector_device)

    def _merge(self, round_index: int) -> MergeReport:
        args = self.args
        weights = loss_gap_weights(self.loss_gaps, args.loss_gap_temperature) if self.loss_gaps else None
        searching = args.outer_learning_rate == "search"
        losses = partial(self.measure_losses, self.plan.tasks) if searching else None
        observe = None
        if self.diagnostics is not None:
            validation = self.trainer.validation_losses if self.trainer.eval_dataset else None
            observe = partial(self.diagnostics.observe, self.rounds, validation)
        moved = {} if self.realignment is None else self.realignment.apply(self.rounds)
        try:
            report = self.rounds.merge(round_index, weights, losses, observe)
        except BaseException:
            if self.realignment is not None:
                self.realignment.undo()
            raise
        report.moved_units = moved
        report.loss_gaps, report.searching = self.loss_gaps, self.searched
        self.loss_gaps, self.searched = {}, 0
        return report

    def _close_round(self, state: Any, control: Any) -> Any:
        report = MergeReport(**{**self.merge_record, "seconds": dict(self.seconds)})
        self.records.append(
            {
                **report.to_dict(),
                "global_step": state.global_step,
                "losses": self.round_losses,
                "experts": self.expert_metrics or None,
                "expert_scores": self.expert_scores,
                "metrics": None,
                "scores": {},
                "metric_names": {},
            }
        )
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.expert_metrics, self.expert_scores = {}, {}
        if self.args.logging_strategy != "no":
            # Not through the host's own log, which may attach what it has gathered since the last loss.
            Trainer.log(self.trainer, round_scalars(self.records[-1]))
        return self.emit("on_round_end", state, control, round=report.round, report=report)

    def end_training(self, state: Any) -> None:
        """A run that stops inside a round leaves the last merged weights, unless the best ones were just loaded."""
        self.running = False
        self.groups.train_shared(True)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best(state)
        elif not self.plan.is_round_end(state.global_step):
            self.rounds.restore()
        refresh_tasks(self.trainer)
        if state.is_world_process_zero:
            self.write_report()

    def emit(self, event: str, state: Any, control: Any, **kwargs: Any) -> Any:
        """Call `event` of every [`ATMCallback`]; other callbacks do not know it."""
        handler = self.trainer.callback_handler
        for callback in handler.callbacks:
            if isinstance(callback, ATMCallback):
                result = getattr(callback, event)(
                    self.args,
                    state,
                    control,
                    model=handler.model,
                    processing_class=handler.processing_class,
                    optimizer=handler.optimizer,
                    lr_scheduler=handler.lr_scheduler,
                    train_dataloader=handler.train_dataloader,
                    eval_dataloader=handler.eval_dataloader,
                    **kwargs,
                )
                control = control if result is None else result
        return control

    def _synchronise_schedule(self, step: int) -> None:
        # A step that gradient scaling skips does not advance the schedule; segments must not inherit the lag.
        scheduler = self.trainer.lr_scheduler
        if self.trainer._created_lr_scheduler and scheduler.last_epoch != step:
            scheduler.last_epoch = step - 1
            scheduler.step()

    def interrupt(self) -> None:
        """An exception leaves the last merged weights, and a trainer that can be used again."""
        # Before a run begins, the rounds still hold the base of the run before.
        if self.running:
            self.groups.train_shared(True)
            self.rounds.restore()
        self.running = False
        self.trainer.is_in_train = False

    # ---- Divergence ----

    def _undo(self, error: DivergenceError) -> DivergenceError:
        self.rounds.restore()
        self.groups.write_private(self.private_backup)
        return DivergenceError(f"{error} The model holds the last merged weights again.")

    def check_log(self, state: Any, logs: Mapping[str, float]) -> None:
        """Stop as soon as a logged loss or gradient norm shows divergence."""
        # Under fp16 an infinite gradient norm is routine: the scaler skips that step.
        names = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        for name in names:
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                task = self.plan.locate(max(state.global_step - 1, 0)).task
                message = (
                    f"{name} became {value} while tuning task {task!r} (step {state.global_step}); lower "
                    "learning_rate, check the task's labels, or leave the task out."
                )
                raise self._undo(DivergenceError(message))
