"""Every Python block in README and docs runs, on small stand-ins for what would come from the Hub."""

from __future__ import annotations

import re

import datasets
import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

import hf_atm

from .pages import PAGES, blocks, prose


BLOCKS = blocks("python")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A tiny BERT under the name the pages use, and GLUE-like data."""
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "day"]
    folder = tmp_path / "google-bert" / "bert-base-uncased"
    folder.mkdir(parents=True)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)

    def load_dataset(name, task):
        assert name == "nyu-mll/glue"
        columns = {"sst2": ["sentence"], "rte": ["sentence1", "sentence2"]}[task]
        rows = {column: [f"a {word} film" for word in ("good", "bad")] * 16 for column in columns}
        features = datasets.Features(
            {
                **{column: datasets.Value("string") for column in columns},
                "label": datasets.ClassLabel(names=["0", "1"]),
            }
        )
        split = datasets.Dataset.from_dict({**rows, "label": [0, 1] * 16}, features=features)
        return datasets.DatasetDict({"train": split, "validation": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path


def shortened(block):
    """The same block with less to do."""
    block = block.replace(
        "num_rounds=10, local_steps=200,", "num_rounds=1, local_steps=2, report_to='none', use_cpu=True,"
    )
    return block


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block, stand_ins):
    if "trl" in block:
        pytest.importorskip("trl", reason="TRL is not installed (extra `trl`)")
    exec(compile(shortened(block), "block", "exec"), {"__name__": "block"})
    if "to_task_model" in block:
        stock = AutoModelForSequenceClassification.from_pretrained(stand_ins / "runs" / "glue" / "sst2")
        assert stock.config.num_labels == 2
        assert hf_atm.MultiTaskModel.from_pretrained(stand_ins / "runs" / "glue" / "merged").config.tasks.keys() == {
            "sst2",
            "rte",
        }


def test_the_pages_have_blocks_and_links_that_exist():
    assert len(BLOCKS) >= 3
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", prose(page)):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
