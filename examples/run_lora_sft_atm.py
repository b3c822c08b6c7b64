"""ATM over TRL's SFTTrainer: several text data sets, one causal language model, LoRA. Needs `pip install trl`.

    python examples/run_lora_sft_atm.py --model_name_or_path Qwen/Qwen3-0.6B --train_files law=law.jsonl code=code.jsonl \\
        --output_dir runs/sft --num_rounds 5 --local_steps 100 --learning_rate 2e-4

Each file holds what SFTTrainer takes: a column `text`, `messages`, or `prompt` and `completion`. `.txt` files hold a
text per line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_atm import ATMArguments, ATMMixin


@dataclass
class ATMSFTConfig(ATMArguments, SFTConfig):
    pass


class ATMSFTTrainer(ATMMixin, SFTTrainer):
    pass


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a causal language model."})
    train_files: list[str] = field(metadata={"help": "task=file pairs; .json, .jsonl, .parquet, .csv or .txt."})
    eval_fraction: float = field(default=0.05, metadata={"help": "Share of each file held out for evaluation."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})


def read(file: str) -> Dataset:
    suffix = Path(file).suffix.removeprefix(".")
    kind = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
    return load_dataset(kind, data_files=file, split="train")


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, ATMSFTConfig)).parse_args_into_dataclasses()
    train, held_out = {}, {}
    for pair in script.train_files:
        task, separator, file = pair.partition("=")
        if not separator:
            raise SystemExit(f"--train_files takes task=file pairs, got {pair!r}.")
        parts = read(file).train_test_split(script.eval_fraction, seed=args.seed)
        train[task], held_out[task] = parts["train"], parts["test"]
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = ATMSFTTrainer(
        AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32),
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=script.lora_rank, lora_alpha=script.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint == "true" or args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
