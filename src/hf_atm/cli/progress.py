"""The one progress bar of a run: which round, which task, and how good the merged model was last."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback


class RoundProgressCallback(TrainerCallback):
    """A bar over all rounds, on terminals only, and no line for every log.

    Args:
        atm: the trainer's loop, which knows the plan.
    """

    def __init__(self, atm: Any) -> None:
        self.atm, self.bar, self.place = atm, None, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.place = None
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            return
        position = self.atm.plan.locate(state.global_step)
        if self.place != (position.round, position.task):
            self.place = (position.round, position.task)
            self.bar.set_description(f"round {position.round + 1}/{args.num_rounds}, {position.task}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        average = (metrics or {}).get("eval_average")
        if self.bar is not None and average is not None:
            self.bar.set_postfix_str(f"merged {average:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def calm_trainer(trainer: Any) -> None:
    """Gives a trainer the bar over its rounds, or none where `disable_tqdm` is set or there are no rounds."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm and hasattr(trainer, "atm"):
        trainer.add_callback(RoundProgressCallback(trainer.atm))
