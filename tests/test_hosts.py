"""The mixin over other trainers: Seq2SeqTrainer, and TRL's SFTTrainer when it is installed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import datasets
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_atm import ATMArguments, ATMCallback, ATMMixin, ATMSeq2SeqTrainer
from tests.testing_utils import largest_difference, make_config, parameters_of


def test_sequence_to_sequence_with_generation(tmp_path):
    config = T5Config(
        vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    # Neither padding nor an early end: the length is the limit's.
    model.generation_config.suppress_tokens = [0, 1]

    @dataclass
    class Config(ATMArguments, Seq2SeqTrainingArguments):
        pass

    def rows(seed):
        ids = torch.randint(1, 32, (16, 5), generator=torch.Generator().manual_seed(seed))
        return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.flip(1).tolist()})

    names = {field.name for field in dataclasses.fields(Config) if field.init}
    values = {name: value for name, value in make_config(tmp_path).to_dict().items() if name in names}
    values |= {"predict_with_generate": True, "generation_max_length": 5, "eval_strategy": "epoch", "num_rounds": 1}
    lengths = []

    def tokens(prediction):
        return int((prediction.predictions > 0).sum(1).max())

    trainer = ATMSeq2SeqTrainer(
        model,
        Config(**values),
        train_dataset={"a": rows(0), "b": rows(1)},
        eval_dataset={"a": rows(2), "b": rows(3)},
        compute_metrics=lambda prediction: {"length": float(lengths.append(tokens(prediction)) or 1)},
    )
    trainer.train()
    # Four tokens after the start token, not the nineteen of an unlimited generation.
    assert lengths == [4, 4]
    assert trainer.report[0]["metrics"]["eval_average"] == 1.0


trl = pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")


@dataclass
class SFTConfig(ATMArguments, trl.SFTConfig):
    pass


class SFTTrainer(ATMMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sft_model():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def stories(kind, size=16):
    subject = {"cats": "the cat sat on", "dogs": "the dog ran far"}[kind]
    ending = ["a mat", "away", "the mat", "a cat", "the dog"]
    return datasets.Dataset.from_dict({"text": [f"{subject} {ending[i % 5]}" for i in range(size)]})


def sft_config(folder, **changes):
    values = {
        "output_dir": str(folder),
        "num_rounds": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "round_table": False,
        "max_length": 8,
        "dataset_num_proc": None,
    }
    return SFTConfig(**{**values, **changes})


def sft(folder, tokenizer, tasks=("cats", "dogs"), **changes):
    names = ("eval_dataset", "callbacks", "peft_config")
    given = {name: changes.pop(name) for name in names if name in changes}
    return SFTTrainer(
        sft_model(),
        sft_config(folder, **changes),
        train_dataset={task: stories(task) for task in tasks},
        processing_class=tokenizer,
        **given,
    )


def test_one_task_of_sft_is_the_host(tmp_path, tokenizer):
    loop = sft(
        tmp_path / "loop",
        tokenizer,
        tasks=("cats",),
        optimizer_policy="keep",
        train_sampling_strategy="sequential",
    )
    loop.train()
    names = {field.name for field in dataclasses.fields(trl.SFTConfig) if field.init}
    config = sft_config(tmp_path, train_sampling_strategy="sequential")
    values = {name: getattr(config, name) for name in names}
    values |= {"output_dir": str(tmp_path / "host"), "num_train_epochs": 2}
    host = trl.SFTTrainer(
        sft_model(), trl.SFTConfig(**values), train_dataset=stories("cats"), processing_class=tokenizer
    )
    host.train()
    assert largest_difference(parameters_of(loop.model), parameters_of(host.model)) <= 1e-6


def test_sft_over_tasks_evaluates_and_resumes(tmp_path, tokenizer):
    events = []

    class Watch(ATMCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            events.append(metrics)

    held_out = {"cats": stories("cats", 5), "dogs": stories("dogs", 5)}
    settings = {"eval_dataset": held_out, "eval_strategy": "epoch"}
    whole = sft(tmp_path / "a", tokenizer, callbacks=[Watch()], save_strategy="steps", save_steps=3, **settings)
    whole.train()
    assert len(events) == 2
    assert {"eval_cats_loss", "eval_dogs_loss", "eval_loss", "eval_cats_mean_token_accuracy"} <= set(events[0])
    for step in (3, 9):
        resumed = sft(tmp_path / f"b{step}", tokenizer, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0.0


def test_sft_with_an_adapter_ends_in_a_plain_model(tmp_path, tokenizer):
    from peft import LoraConfig

    trainer = sft(tmp_path / "run", tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = copy.deepcopy(trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight)
    trainer.train()
    trainer.save_model(str(tmp_path / "merged"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, before)
    ids = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert (loaded.eval()(input_ids=ids).logits - expected).abs().max() <= 1e-6


def test_a_plain_config_is_refused_for_sft(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="mix.*ATMArguments"):
        SFTTrainer(
            sft_model(),
            trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            train_dataset={"cats": stories("cats")},
            processing_class=tokenizer,
        )
