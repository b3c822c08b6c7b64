"""ATM on GLUE tasks, in the manner of transformers' run_glue.py: one encoder, one head per task.

    python examples/run_glue_atm.py --model_name_or_path google-bert/bert-base-uncased --task_names sst2 mrpc rte \\
        --output_dir runs/glue --num_rounds 10 --local_steps 200 --eval_strategy epoch

With `--data_folder` the tasks are read from local folders of that name instead of nyu-mll/glue on the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from hf_atm import ATMConfig, ATMTrainer, MultiTaskModel
from hf_atm.metrics import GLUE_METRICS
from hf_atm.tasks import TaskSpec, load_task, prepare_text


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of an encoder or decoder."})
    task_names: list[str] = field(
        default_factory=lambda: ["cola", "mrpc", "qnli", "rte", "sst2", "stsb"], metadata={"help": "GLUE tasks."}
    )
    data_folder: str | None = field(default=None, metadata={"help": "Folder with a sub-folder per task."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens kept of a text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Tune on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a subset of this size."})
    lora_rank: int | None = field(default=None, metadata={"help": "Train a LoRA adapter of this rank instead."})
    export_tasks: bool = field(default=False, metadata={"help": "Save a stock model per task beside the merged one."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, ATMConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tasks = {}
    for name in script.task_names:
        local = script.data_folder is not None
        spec = TaskSpec(
            name,
            str(Path(script.data_folder, name)) if local else "nyu-mll/glue",
            subset=None if local else name,
            metrics=GLUE_METRICS.get(name),
            max_train_examples=script.max_train_samples,
            max_eval_examples=script.max_eval_samples,
            max_length=script.max_seq_length,
        )
        tasks[name] = prepare_text(load_task(spec, args.seed), tokenizer)
    model = MultiTaskModel.from_backbone(
        script.model_name_or_path, tasks={name: task.head for name, task in tasks.items()}, seed=args.seed
    )
    peft = None
    if script.lora_rank is not None:
        peft = LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules="all-linear")
        # The heads are trained beside the adapter, not through it.
        peft.exclude_modules = r"heads\..*"
    trainer = ATMTrainer(
        model,
        args,
        train_dataset={name: task.splits["train"] for name, task in tasks.items()},
        eval_dataset={name: task.splits["eval"] for name, task in tasks.items()},
        compute_metrics={name: task.compute_metrics for name, task in tasks.items()},
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint == "true" or args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.log_metrics("eval", metrics)
    if script.export_tasks and peft is None:
        for name in tasks:
            folder = Path(args.output_dir, "tasks", name)
            trainer.model.to_task_model(name).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
