"""Trains the tiny model under a launcher and saves what the tests compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from tests.test_prototypical_tasks import TwoTasks, data_of_two, few_data
from tests.test_realignment import Reorder, tiny
from tests.testing_utils import METRICS, TinyModel, accuracy, make_data, make_trainer, parameters_of


class Signal(TrainerCallback):
    """What SIGTERM does once its grace period is over, on the second process only."""

    def __init__(self, trainer: Trainer) -> None:
        callbacks = trainer.callback_handler.callbacks
        self.manager = next(c.jit_manager for c in callbacks if isinstance(c, JITCheckpointCallback))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            self.manager.is_checkpoint_requested = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch-norm", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--eval-size", type=int, default=13, help="by default no number of processes divides it")
    parser.add_argument("--few", action="store_true", help="two tasks, one with a prototypical head")
    parser.add_argument("--resume")
    parser.add_argument("--term", action="store_true", help="one process is told to save and stop after four steps")
    parser.add_argument("--reorder", action="store_true", help="one task's units change places in the first round")
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"colour": 24, "shape": 16, "size": 16}
    model = (tiny if options.reorder else TinyModel)(dropout=options.dropout, batch_norm=options.batch_norm)
    train = {task: make_data(task, size) for task, size in sizes.items()}
    evaluation, metrics = {task: make_data(task, options.eval_size) for task in sizes}, METRICS
    if options.few:
        model, train, metrics = TwoTasks(scale="auto"), data_of_two(), accuracy
        evaluation = {"few": few_data(8, seed=1), "many": make_data("many", 16, labels=2)}
    peft = {"peft_config": LoraConfig(r=2, target_modules=["body.0", "body.2"])} if options.lora else {}
    trainer = make_trainer(
        options.folder,
        model,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=metrics,
        eval_strategy="epoch",
        num_rounds=2,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=options.accumulation,
        logging_steps=1,
        **peft,
        **options.settings,
    )
    if options.reorder:
        reorder = Reorder()
        reorder.trainer = trainer
        trainer.add_callback(reorder)
    if options.term:
        trainer.add_callback(Signal(trainer))
    trainer.train(resume_from_checkpoint=options.resume)
    state = parameters_of(trainer.model)
    torch.save(state, Path(options.folder, f"state-{trainer.args.process_index}.pt"))
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        scores = [record["scores"] for record in trainer.report]
        content = {"grad_norms": [entry["grad_norm"] for entry in history], "scores": scores}
        content["moved"] = [record["moved_units"] for record in trainer.report]
        Path(options.folder, "log.json").write_text(json.dumps(content))
    trainer.end()


if __name__ == "__main__":
    main()
