"""Pretrains the small ConvNeXt that `configs/vision_local.yaml` starts from: a shared start is what merging needs.

    python examples/pretrain_vision_base.py --data ../shared/data/vision/cifar100 --output_dir runs/vision_base

Twenty coarse CIFAR-100 classes, plain Trainer, about four minutes on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_atm.tasks import TaskSpec, load_task, make_image_processor, prepare_images


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder with the splits train and validation."})
    output_dir: str = field(metadata={"help": "Where the backbone and its image processor go."})
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="coarse_label", metadata={"help": "Column of labels."})
    epochs: float = field(default=10.0, metadata={"help": "Epochs."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and data order."})


def main() -> None:
    (options,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(options.seed)
    spec = TaskSpec("base", options.data, image_column=options.image_column, label_column=options.label_column)
    processor = make_image_processor(32, 3, 0.5, 0.5)
    task = prepare_images(load_task(spec, options.seed), processor, 3)
    config = ConvNextConfig(
        patch_size=2,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 2],
        num_stages=3,
        image_size=32,
        num_labels=task.spec.num_labels,
    )
    args = TrainingArguments(
        f"{options.output_dir}/training",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=options.seed,
    )
    trainer = Trainer(
        ConvNextForImageClassification(config),
        args,
        train_dataset=task.splits["train"],
        eval_dataset=task.splits["eval"],
        data_collator=default_data_collator,
        compute_metrics=task.compute_metrics,
    )
    trainer.train()
    print(f"validation accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.model.convnext.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
