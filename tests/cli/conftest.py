from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = ["good", "bad", "film", "plot", "red", "blue", "one", "two", "three", "four"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


@pytest.fixture
def encoder(tmp_path):
    """A folder with a tiny BERT and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    _tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def decoder(tmp_path):
    """A folder with a tiny Llama and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "decoder")
    _tokenizer().save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture
def text_data(tmp_path):
    """Two tasks of 32 training and 8 other examples: a class, and a number for a pair."""
    generator = np.random.default_rng(0)
    for split, size in (("train", 32), ("validation", 8), ("test", 8)):
        numbers = generator.integers(0, 10, (size, 3))
        first = [f"{WORDS[a]} {WORDS[b]}" for a, b, _ in numbers]
        second = [WORDS[c] for *_, c in numbers]
        tone = Dataset.from_dict(
            {"text": first, "label": [int(a < 5) for a, *_ in numbers]},
            features=Features({"text": Value("string"), "label": ClassLabel(names=["n", "p"])}),
        )
        likeness = Dataset.from_dict(
            {"a": first, "b": second, "label": [abs(a - c) / 2 for a, _, c in numbers.astype(float)]}
        )
        for name, data in (("tone", tone), ("likeness", likeness)):
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            data.to_parquet(str(folder / f"{split}.parquet"))
    return tmp_path / "data"


@pytest.fixture
def image_data(tmp_path):
    """Two tasks of 16 pictures, one grey and one in colour."""
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"])})
    for name, shape in (("grey", (8, 8)), ("colour", (10, 10, 3))):
        pictures = [PILImage.fromarray(generator.integers(0, 256, shape).astype(np.uint8)) for _ in range(16)]
        data = Dataset.from_dict({"image": pictures, "label": [0, 1] * 8}, features=features)
        DatasetDict({"train": data, "validation": data}).save_to_disk(str(tmp_path / "data" / name))
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, encoder, text_data):
    """Writes a YAML file; keyword arguments replace its top-level keys."""

    def write(**changes):
        content = {
            "data_root": "data",
            "model": {"backbone": "encoder"},
            "tasks": {
                "tone": {"dataset": "tone"},
                "likeness": {"dataset": "likeness", "metrics": ["spearmanr", "mse"]},
            },
            "training": training(tmp_path),
        }
        content.update(changes)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def training(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path / "run"),
        "num_rounds": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": "1e-3",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    } | changes
