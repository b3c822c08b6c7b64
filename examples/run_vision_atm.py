"""ATM on image classification tasks: one image model, one head per task.

    python examples/run_vision_atm.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --datasets ylecun/mnist uoft-cs/cifar10 --output_dir runs/vision --num_rounds 10 --local_steps 100 \\
        --eval_strategy epoch

A data set is a Hub id or a local folder (parquet, or images in a sub-folder per class); its last part names the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoImageProcessor, HfArgumentParser, default_data_collator, set_seed

from hf_atm import ATMConfig, ATMTrainer, MultiTaskModel
from hf_atm.tasks import TaskSpec, load_task, make_image_processor, prepare_images


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of an image model."})
    datasets: list[str] = field(metadata={"help": "Hub ids or folders, one per task."})
    train_split: str = field(default="train", metadata={"help": "Split to tune on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels, if the model has no image processor."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Tune on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a subset of this size."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, ATMConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    if script.image_size is None:
        processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    else:
        processor = make_image_processor(script.image_size)
    tasks = {}
    for dataset in script.datasets:
        name = Path(dataset).name
        spec = TaskSpec(
            name,
            dataset,
            train_split=script.train_split,
            eval_split=script.eval_split,
            max_train_examples=script.max_train_samples,
            max_eval_examples=script.max_eval_samples,
        )
        tasks[name] = prepare_images(load_task(spec, args.seed), processor)
    trainer = ATMTrainer(
        MultiTaskModel.from_backbone(
            script.model_name_or_path, tasks={name: task.head for name, task in tasks.items()}, seed=args.seed
        ),
        args,
        train_dataset={name: task.splits["train"] for name, task in tasks.items()},
        eval_dataset={name: task.splits["eval"] for name, task in tasks.items()},
        compute_metrics={name: task.compute_metrics for name, task in tasks.items()},
        data_collator=default_data_collator,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint == "true" or args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.log_metrics("eval", metrics)


if __name__ == "__main__":
    main()
