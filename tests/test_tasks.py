from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_atm.tasks import (
    TaskSpec,
    load_task,
    make_image_processor,
    prepare_causal_lm,
    prepare_images,
    prepare_text,
)

from .testing_utils import SHARED_DATA, requires_shared_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer():
    words = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "plot", "a"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


@pytest.fixture
def rows():
    return {"sentence": ["good film", "bad plot", "a film", "bad"] * 5, "label": [1, 0, 1, 0] * 5}


def write(folder, rows, kind="parquet", splits=("train", "validation"), features=None):
    folder.mkdir(exist_ok=True)
    data = Dataset.from_dict(rows, features=features)
    for split in splits:
        {"parquet": data.to_parquet, "json": data.to_json, "csv": data.to_csv}[kind](str(folder / f"{split}.{kind}"))
    return str(folder)


def images(count=6, mode="L", size=(10, 8), feature=True):
    generator = np.random.default_rng(0)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pictures = [PILImage.fromarray(generator.integers(0, 256, shape).astype(np.uint8)) for _ in range(count)]
    features = Features({"picture": Image(), "label": ClassLabel(names=["x", "y"])})
    return Dataset.from_dict({"picture": pictures, "label": [i % 2 for i in range(count)]}, features=features)


@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_local_files(tmp_path, rows, kind):
    task = load_task(TaskSpec("sst2", write(tmp_path / "data", rows, kind)))
    assert task.kind == "text"
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 20, "eval": 20}
    assert task.head == {"num_labels": 2, "problem_type": "single_label_classification"}
    assert task.splits["train"].column_names == ["text", "labels"]
    assert task.spec.metrics == ["accuracy"]


def test_one_file_with_slices(tmp_path, rows):
    write(tmp_path / "data", rows, "json", splits=("train",))
    file = str(tmp_path / "data" / "train.json")
    task = load_task(TaskSpec("a", file, train_split="train[:75%]", eval_split="train[75%:]"))
    assert len(task.splits["train"]) == 15
    assert len(task.splits["eval"]) == 5


def test_saved_to_disk(tmp_path, rows):
    data = Dataset.from_dict(rows)
    DatasetDict({"train": data, "dev": data.select(range(4))}).save_to_disk(str(tmp_path / "dict"))
    data.save_to_disk(str(tmp_path / "single"))
    assert len(load_task(TaskSpec("a", str(tmp_path / "dict"), eval_split="dev")).splits["eval"]) == 4
    assert len(load_task(TaskSpec("a", str(tmp_path / "single"), eval_split=None)).splits["train"]) == 20
    with pytest.raises(ValueError, match="cannot read split 'validation'.*only dev, train"):
        load_task(TaskSpec("a", str(tmp_path / "dict")))


def test_image_folder(tmp_path):
    for split in ("train", "validation"):
        for index, row in enumerate(images()):
            folder = tmp_path / "pets" / split / ("cat" if row["label"] else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            row["picture"].save(folder / f"{index}.png")
    task = load_task(TaskSpec("pets", str(tmp_path / "pets")))
    assert task.kind == "image"
    assert task.head["label2id"] == {"cat": 0, "dog": 1}


def test_labels_of_every_kind(tmp_path):
    text = ["a"] * 4
    strings = load_task(TaskSpec("s", write(tmp_path / "s", {"text": text, "label": ["no", "yes", "no", "may"]})))
    assert strings.spec.label_names == ["may", "no", "yes"]
    assert strings.splits["train"]["labels"][:] == [1, 2, 1, 0]
    floats = load_task(TaskSpec("f", write(tmp_path / "f", {"text": text, "label": [0.5, 1.0, 2.0, 5.0]})))
    assert floats.head == {"num_labels": 1, "problem_type": "regression"}
    assert floats.spec.metrics == ["pearsonr", "spearmanr"]
    assert floats.splits["train"].features["labels"] == Value("float32")
    stars = write(tmp_path / "i", {"text": text, "labels": [1, 2, 3, 4]})
    assert load_task(TaskSpec("i", stars)).spec.num_labels == 5
    assert load_task(TaskSpec("i", stars, problem_type="regression")).splits["train"]["labels"][0] == 1.0
    features = Features({"text": Value("string"), "label": ClassLabel(names=["n", "p"])})
    named = write(tmp_path / "c", {"text": text, "label": [0, 1, 0, 1]}, features=features)
    assert load_task(TaskSpec("c", named)).head["label2id"] == {"n": 0, "p": 1}
    booleans = write(tmp_path / "b", {"text": text, "label": [True, False, True, False]})
    assert load_task(TaskSpec("b", booleans)).splits["train"]["labels"][:] == [1, 0, 1, 0]


def test_glue_metrics_by_subset(tmp_path, rows):
    folder = write(tmp_path / "my_glue", rows)
    # `subset` names GLUE's task; a folder of files has no configurations, so it is only read for its metrics.
    assert load_task(TaskSpec("x", folder, subset="mrpc")).spec.metrics == ["accuracy", "f1"]


def test_subsets_are_reproducible_and_depend_on_the_seed(tmp_path):
    folder = write(tmp_path / "data", {"text": [str(i) for i in range(100)], "label": [i % 2 for i in range(100)]})
    spec = TaskSpec("a", folder, max_train_examples=10, max_eval_examples=5)
    first, again, other = load_task(spec, 1), load_task(spec, 1), load_task(spec, 2)
    assert first.splits["train"]["text"][:] == again.splits["train"]["text"][:]
    assert first.splits["train"]["text"][:] != other.splits["train"]["text"][:]
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 10, "eval": 5}


def test_a_few_of_each_class(tmp_path):
    labels = ["a"] * 50 + ["b"] * 3 + ["c"] * 20
    folder = write(tmp_path / "data", {"text": [str(i) for i in range(73)], "label": labels})
    spec = TaskSpec("a", folder, max_train_per_class=5)
    first, again, other = (load_task(spec, seed) for seed in (1, 1, 2))
    assert np.bincount(first.splits["train"]["labels"][:]).tolist() == [5, 3, 5]
    assert first.splits["train"]["text"][:] == again.splits["train"]["text"][:]
    assert first.splits["train"]["text"][:] != other.splits["train"]["text"][:]
    assert len(first.splits["eval"]) == 73
    numbers = write(tmp_path / "numbers", {"text": ["x"] * 4, "label": [0.5, 1.0, 1.5, 2.0]})
    with pytest.raises(ValueError, match="max_train_per_class needs classes"):
        load_task(TaskSpec("a", numbers, max_train_per_class=2))


def test_a_prototypical_head_is_in_the_models_entry(tmp_path, rows):
    folder = write(tmp_path / "a", rows)
    plain, episodic = (
        load_task(TaskSpec("a", folder, **more)).head
        for more in ({}, {"head": "prototypical", "k_shot": 2, "n_query": 1})
    )
    assert episodic == {**plain, "head": "prototypical", "k_shot": 2, "n_query": 1}
    with pytest.raises(ValueError, match="a language model has none"):
        load_task(TaskSpec("a", folder, head="prototypical", text_columns=["sentence"]), causal_lm=True)


def test_prepare_text(tmp_path, tokenizer, rows):
    task = prepare_text(load_task(TaskSpec("a", write(tmp_path / "a", rows), max_length=3)), tokenizer)
    assert task.splits["train"][0] == {"labels": 1, "input_ids": [1, 4, 2], "attention_mask": [1, 1, 1]} | {
        key: value for key, value in task.splits["train"][0].items() if key == "token_type_ids"
    }
    pairs = {"premise": ["good film"], "hypothesis": ["bad"], "extra": ["a"], "label": [1.0]}
    spec = TaskSpec("p", write(tmp_path / "p", pairs), text_columns=["hypothesis", "premise"])
    assert prepare_text(load_task(spec), tokenizer).splits["eval"][0]["input_ids"] == [1, 5, 2, 4, 6, 2]


def test_prepare_causal_lm(tmp_path, tokenizer):
    tokenizer.eos_token = "[SEP]"
    folder = tmp_path / "lm"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("good film\nbad plot\na film\n")
    task = prepare_causal_lm(load_task(TaskSpec("a", str(folder), max_length=5), causal_lm=True), tokenizer)
    # Every text already ends with the end token, which must not be doubled: 3 texts of 4 tokens, two blocks of 5.
    assert task.splits["train"]["input_ids"][:] == [[1, 4, 6, 2, 1], [5, 7, 2, 1, 8]]
    assert task.splits["train"]["labels"][:] == task.splits["train"]["input_ids"][:]
    with pytest.raises(ValueError, match="holds 12 tokens, fewer than one block of 13"):
        prepare_causal_lm(load_task(TaskSpec("a", str(folder), max_length=13), causal_lm=True), tokenizer)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_equal_the_processor_and_are_stored_as_bytes(tmp_path, mode):
    folder = tmp_path / "pictures"
    DatasetDict({"train": images(mode=mode)}).save_to_disk(str(folder))
    processor = make_image_processor(6, mean=[0.4, 0.5, 0.6], std=0.25)
    task = prepare_images(load_task(TaskSpec("a", str(folder), eval_split=None)), processor)
    data = task.splits["train"]
    expected = processor([row["picture"].convert("RGB") for row in images(mode=mode)], return_tensors="pt")
    batch = default_data_collator([data[i] for i in range(len(data))])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)
    assert batch["labels"].tolist() == [0, 1] * 3
    assert data.features["pixel_values"] == Value("binary")
    assert len(data.with_format(None)[0]["pixel_values"]) == 3 * 6 * 6
    assert list(data["labels"]) == [0, 1] * 3
    copy = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(copy[1]["pixel_values"], data[1]["pixel_values"])


def test_images_with_one_channel(tmp_path):
    DatasetDict({"train": images(mode="RGB")}).save_to_disk(str(tmp_path / "p"))
    task = load_task(TaskSpec("a", str(tmp_path / "p"), eval_split=None))
    pixels = prepare_images(task, make_image_processor(5, num_channels=1), num_channels=1).splits["train"][0]
    assert pixels["pixel_values"].shape == (1, 5, 5)
    assert pixels["pixel_values"].abs().max() <= 1


def test_images_of_several_sizes_are_refused(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    data = Dataset.from_dict(
        {"image": [PILImage.new("RGB", (4, 4)), PILImage.new("RGB", (4, 8))], "label": [0, 1]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "p"))
    task = load_task(TaskSpec("a", str(tmp_path / "p"), eval_split=None))
    with pytest.raises(ValueError, match="several sizes"):
        prepare_images(task, ViTImageProcessorPil(do_resize=False))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"label_column": "y"}, KeyError, "has no column 'y'; its columns are sentence, label"),
        ({"text_columns": ["txt"]}, KeyError, "has no column 'txt'; its columns are sentence, label"),
        ({"image_column": "img"}, KeyError, "has no column 'img'"),
        ({"text_columns": ["a", "b", "c"]}, ValueError, "takes one or two columns"),
        ({"eval_split": "dev"}, ValueError, "cannot read split 'dev'"),
        ({"metrics": ["acc"]}, KeyError, "task 'a': unknown metric 'acc'; known metrics: accuracy"),
        ({"metrics": "pearsonr"}, ValueError, "does not suit"),
        ({"num_labels": 1}, ValueError, r"labels outside 0\.\.0, such as 1"),
        ({"num_labels": 0}, ValueError, "num_labels must be a whole number from 1, not 0"),
        ({"max_train_examples": -1}, ValueError, "max_train_examples must be a whole number"),
        ({"problem_type": "ranking"}, ValueError, "unknown problem_type 'ranking'; known: regression"),
        ({"num_labels": 3, "label_names": ["n", "p"]}, ValueError, "num_labels is 3, but there are 2 label names"),
        ({"num_labels": 3, "problem_type": "regression"}, ValueError, "a regression has one label"),
        ({"train_split": None, "eval_split": None}, ValueError, "no split given"),
        ({"train_split": "train[:0]"}, ValueError, "it is empty"),
    ],
)
def test_bad_specifications(tmp_path, rows, fields, error, message):
    with pytest.raises(error, match=message):
        load_task(TaskSpec("a", write(tmp_path / "data", rows), **fields))


def test_bad_labels(tmp_path):
    text = {"text": ["a", "b"]}
    with pytest.raises(ValueError, match=r"split 'train' has 1 labels outside 0\.\.1, such as -1"):
        load_task(TaskSpec("a", write(tmp_path / "m", {**text, "label": [-1, 1]})))
    with pytest.raises(ValueError, match="examples without a label"):
        load_task(TaskSpec("a", write(tmp_path / "n", {**text, "label": [None, 1]})))
    with pytest.raises(ValueError, match="not finite"):
        load_task(TaskSpec("a", write(tmp_path / "f", {**text, "label": [1.0, float("nan")]})))
    folder = write(tmp_path / "s", {**text, "label": ["x", "y"]}, "json", ["train"])
    write(tmp_path / "s", {**text, "label": ["x", "z"]}, "json", ["validation"])
    with pytest.raises(ValueError, match="split 'validation' has the label 'z', which is not among x, y"):
        load_task(TaskSpec("a", folder))


def test_empty_split(tmp_path, rows):
    folder = write(tmp_path / "d", rows)
    Dataset.from_dict(rows).select([]).to_parquet(str(tmp_path / "d" / "train.parquet"))
    with pytest.raises(ValueError, match="task 'a': cannot read split 'train' of .* it is empty"):
        load_task(TaskSpec("a", folder))


def test_ambiguous_text_columns_list_the_columns(tmp_path):
    folder = write(tmp_path / "d", {"a": ["x"], "b": ["x"], "c": ["x"], "label": [0]})
    with pytest.raises(ValueError, match="must name one or two columns; the columns .* are a, b, c, label"):
        load_task(TaskSpec("a", folder))


def test_missing_data_set():
    with pytest.raises(FileNotFoundError, match="task 'a': data set './nowhere' was not found"):
        load_task(TaskSpec("a", "./nowhere"))
    with pytest.raises(FileNotFoundError, match="neither as a local path nor on the Hub"):
        load_task(TaskSpec("a", "somebody/no-such-data-set"))


def test_wrong_kind_of_data(tmp_path, rows):
    with pytest.raises(ValueError, match="holds text data, and this model needs image data"):
        prepare_images(load_task(TaskSpec("a", write(tmp_path / "d", rows))), make_image_processor(4))


@pytest.mark.real_data
@requires_shared_data
def test_real_data():
    pair = load_task(TaskSpec("stsb", str(SHARED_DATA / "text" / "stsb"), max_train_examples=10, max_eval_examples=10))
    assert pair.spec.problem_type == "regression"
    assert pair.splits["train"].column_names == ["text", "text_pair", "labels"]
    grey = load_task(
        TaskSpec("mnist", str(SHARED_DATA / "vision" / "mnist"), max_train_examples=4, max_eval_examples=4)
    )
    grey = prepare_images(grey, make_image_processor(32))
    assert grey.splits["train"][0]["pixel_values"].shape == (3, 32, 32)
    assert len(grey.head["label2id"]) == 10
