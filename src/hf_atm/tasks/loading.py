"""Task specifications and the data they name: columns found, labels checked, the head derived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image, Value

from ..metrics import GLUE_METRICS, build_compute_metrics, check_metrics


_FILE_BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
}
_LIMITS = ("max_train_per_class", "max_train_examples", "max_eval_examples", "max_test_examples")
_PROBLEM_TYPES = ("regression", "single_label_classification")


@dataclass
class TaskSpec:
    """Where a task's data lies and how it is read. Every field but `name` and `dataset` may be left out."""

    name: str = field(metadata={"help": "Name of the task, as in the model's heads."})
    dataset: str = field(metadata={"help": "Hub id, data file, or folder (parquet, json, csv, images, save_to_disk)."})
    subset: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, as in ('glue', 'sst2')."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of a Hub data set."})
    train_split: str | None = field(
        default="train", metadata={"help": "Split to tune on; slices such as train[:90%]."}
    )
    eval_split: str | None = field(default="validation", metadata={"help": "Split evaluated during the run."})
    test_split: str | None = field(default=None, metadata={"help": "Labelled split evaluated once, after the run."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One text column, or two for pairs."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; default label or labels."})
    num_labels: int | None = field(default=None, metadata={"help": "Number of classes, if not in the features."})
    label_names: list[str] | None = field(default=None, metadata={"help": "Names of the classes, in order."})
    problem_type: str | None = field(
        default=None, metadata={"help": "'regression' or 'single_label_classification', if not in the features."}
    )
    metrics: list[str] | None = field(default=None, metadata={"help": "Metrics; the first enters the average."})
    head: str | None = field(
        default=None, metadata={"help": "'prototypical' learns from episodes, without a classifier."}
    )
    n_way: int | None = field(default=None, metadata={"help": "Classes per episode; all by default."})
    k_shot: int | None = field(default=None, metadata={"help": "Support samples per class in an episode."})
    n_query: int | None = field(default=None, metadata={"help": "Query samples per class in an episode."})
    max_train_per_class: int | None = field(
        default=None, metadata={"help": "Tune on a random subset with this many examples of each class."}
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Tune on a random subset of this size."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Evaluate on a subset of this size."})
    max_test_examples: int | None = field(default=None, metadata={"help": "Test on a random subset of this size."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens kept of a text; block length of a LM."})

    def __post_init__(self) -> None:
        for name in ("text_columns", "metrics"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name in ("num_labels", "n_way", "k_shot", "n_query", *_LIMITS, "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"task {self.name!r}: {name} must be a whole number from 1, not {value!r}")
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"task {self.name!r}: text_columns takes one or two columns, not {self.text_columns!r}")
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            raise ValueError(
                f"task {self.name!r}: unknown problem_type {self.problem_type!r}; known: {', '.join(_PROBLEM_TYPES)}"
            )


@dataclass
class TaskData:
    """A loaded task.

    Args:
        spec (`TaskSpec`): The specification, its open fields filled in.
        splits (`dict[str, Dataset]`): Up to three data sets, under `"train"`, `"eval"` and `"test"`. Before
            preparation their columns are `text` (and `text_pair`) or `image`, and `labels`.
        kind (`str`): `"text"`, `"image"` or `"causal_lm"`.
    """

    spec: TaskSpec
    splits: dict[str, Dataset]
    kind: str

    @property
    def head(self) -> dict[str, Any]:
        """The entry of this task in `MultiTaskModel.from_backbone(..., tasks=...)`."""
        head: dict[str, Any] = {"num_labels": self.spec.num_labels, "problem_type": self.spec.problem_type}
        if self.spec.label_names is not None:
            head["label2id"] = {name: index for index, name in enumerate(self.spec.label_names)}
        episodes = {key: getattr(self.spec, key) for key in ("head", "n_way", "k_shot", "n_query")}
        return head | {key: value for key, value in episodes.items() if value is not None}

    @property
    def compute_metrics(self) -> Callable:
        """The task's metric function for the Trainer."""
        return build_compute_metrics(self.spec.metrics or [], self.spec.problem_type == "regression")

    def map(self, function: Callable[[Dataset], Dataset]) -> TaskData:
        """The same task with `function` applied to every split."""
        return replace(self, splits={name: function(split) for name, split in self.splits.items()})


def load_task(spec: TaskSpec, seed: int = 0, causal_lm: bool = False) -> TaskData:
    """Reads a task's splits and fills in what its specification leaves open.

    Labels that are `ClassLabel`, strings or integers make a classification task, floats a regression. Text columns
    left open are the one or two string columns beside the label; metrics left open are GLUE's own for a subset of a
    GLUE data set, else accuracy, or Pearson and Spearman correlation.

    Args:
        spec (`TaskSpec`): The specification.
        seed (`int`, *optional*, defaults to 0): Decides the examples kept by `max_train_examples`, `max_train_per_class` and their like.
        causal_lm (`bool`, *optional*, defaults to `False`): Read one text column and no label.

    Raises:
        FileNotFoundError: If the data set is neither a local path nor found on the Hub.
        KeyError: If a column or metric is unknown; the message lists those there are.
        ValueError: If a split is missing or empty, or labels are missing, out of range or new in evaluation.
    """
    wanted = {"train": spec.train_split, "eval": spec.eval_split, "test": spec.test_split}
    splits = {part: _read_split(spec, split) for part, split in wanted.items() if split is not None}
    if not splits:
        raise ValueError(f"task {spec.name!r}: no split given; set train_split, eval_split or test_split")
    limits = {"train": spec.max_train_examples, "eval": spec.max_eval_examples, "test": spec.max_test_examples}
    for part, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"task {spec.name!r}: split {wanted[part]!r} of {spec.dataset!r} is empty")
        limit = limits[part]
        if part == "train" and spec.max_train_per_class is not None and not causal_lm:
            splits[part] = split = _few_of_each(spec, split, seed)
        if limit is not None and limit < len(split):
            splits[part] = split.shuffle(seed=seed).select(range(limit))
    first = next(iter(splits.values()))
    if causal_lm:
        if spec.head is not None:
            raise ValueError(f"task {spec.name!r}: head is {spec.head!r}, and a language model has none; leave it out")
        (text,) = _text_columns(spec, first, label=None, most=1)
        return TaskData(spec, {part: _select(spec, s, {"text": text}) for part, s in splits.items()}, "causal_lm")

    label = _label_column(spec, first)
    images = [name for name, feature in first.features.items() if isinstance(feature, Image)]
    if spec.image_column is not None or (spec.text_columns is None and images):
        kind, columns = "image", {"image": spec.image_column or images[0]}
    else:
        kind, columns = "text", dict(zip(("text", "text_pair"), _text_columns(spec, first, label), strict=False))
    splits = {part: _select(spec, split, {**columns, "labels": label}) for part, split in splits.items()}
    spec = _infer_labels(spec, first.features[label], splits)
    splits = {part: _encode_labels(spec, wanted[part], split) for part, split in splits.items()}
    regression = spec.problem_type == "regression"
    if spec.metrics is None:
        glue = GLUE_METRICS.get(spec.subset or "") if "glue" in spec.dataset.lower() else None
        spec = replace(spec, metrics=glue or (["pearsonr", "spearmanr"] if regression else ["accuracy"]))
    check_metrics(spec.metrics or [], regression, spec.num_labels, spec.name)
    return TaskData(spec, splits, kind)


def _read_split(spec: TaskSpec, split: str) -> Dataset:
    path = Path(spec.dataset).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            stored = datasets.load_from_disk(str(path))
            parts = stored if isinstance(stored, dict) else {"train": stored}
            if split not in parts:
                raise ValueError(f"there is no such split, only {', '.join(sorted(parts))}")
            return parts[split]
        if path.is_dir():
            files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix in _FILE_BUILDERS}
            found = {stem: p for stem, p in files.items() if stem in ("train", "validation", "test", split)}
            if found and len({p.suffix for p in found.values()}) == 1:
                builder = _FILE_BUILDERS[next(iter(found.values())).suffix]
                return datasets.load_dataset(builder, data_files={s: str(p) for s, p in found.items()}, split=split)
            return datasets.load_dataset(str(path), spec.subset, split=split)
        if path.is_file() and path.suffix in _FILE_BUILDERS:
            return datasets.load_dataset(_FILE_BUILDERS[path.suffix], data_files={"train": str(path)}, split=split)
        if spec.dataset.startswith((".", "/", "~")):
            raise FileNotFoundError
        return datasets.load_dataset(spec.dataset, spec.subset, revision=spec.revision, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"task {spec.name!r}: data set {spec.dataset!r} was not found, neither as a local path nor on the Hub"
        ) from error
    except Exception as error:  # the readers behind `datasets` raise errors of many kinds
        reason = " ".join(str(error).split())[:300]
        if "corresponds to no data" in reason:
            reason = "it is empty"
        raise ValueError(f"task {spec.name!r}: cannot read split {split!r} of {spec.dataset!r}: {reason}") from error


def _label_column(spec: TaskSpec, data: Dataset) -> str:
    names = [spec.label_column] if spec.label_column is not None else ["label", "labels"]
    for name in names:
        if name in data.features:
            return name
    raise _unknown_column(spec, names[0], data)


def _few_of_each(spec: TaskSpec, data: Dataset, seed: int) -> Dataset:
    """At most `max_train_per_class` examples of every class, drawn at random."""
    column = _label_column(spec, data)
    if spec.problem_type == "regression" or str(getattr(data.features[column], "dtype", "")).startswith("float"):
        raise ValueError(f"task {spec.name!r}: max_train_per_class needs classes, and {column!r} holds numbers")
    data = data.shuffle(seed=seed)
    seen: Counter[Any] = Counter()
    rows = []
    for row, label in enumerate(data[column]):
        seen[label] += 1
        if seen[label] <= (spec.max_train_per_class or 0):
            rows.append(row)
    return data.select(rows)


def _text_columns(spec: TaskSpec, data: Dataset, label: str | None, most: int = 2) -> list[str]:
    if spec.text_columns is not None:
        columns = spec.text_columns
    else:
        kinds = (Value("string"), Value("large_string"))
        columns = [name for name, feature in data.features.items() if feature in kinds and name != label]
    if not 1 <= len(columns) <= most:
        limit = "one column" if most == 1 else "one or two columns"
        raise ValueError(
            f"task {spec.name!r}: text_columns must name {limit}; the columns of {spec.dataset!r} are "
            f"{', '.join(data.column_names)}"
        )
    return columns


def _unknown_column(spec: TaskSpec, column: str, data: Dataset) -> KeyError:
    names = ", ".join(data.column_names)
    return KeyError(f"task {spec.name!r}: {spec.dataset!r} has no column {column!r}; its columns are {names}")


def _select(spec: TaskSpec, data: Dataset, columns: Mapping[str, str]) -> Dataset:
    for column in columns.values():
        if column not in data.column_names:
            raise _unknown_column(spec, column, data)
    data = data.select_columns(list(dict.fromkeys(columns.values())))
    return data.rename_columns({old: new for new, old in columns.items() if old != new})


def _infer_labels(spec: TaskSpec, feature: Any, splits: Mapping[str, Dataset]) -> TaskSpec:
    """Fills in problem type, number and names of the labels."""
    kind = getattr(feature, "dtype", None)
    problem = spec.problem_type
    if problem is None:
        problem = "regression" if str(kind).startswith("float") else "single_label_classification"
    if problem == "regression":
        if spec.num_labels not in (None, 1) or kind in ("string", "large_string"):
            raise ValueError(
                f"task {spec.name!r}: a regression has one label, a number, not {spec.num_labels} or text"
            )
        return replace(spec, problem_type=problem, num_labels=1)
    names = spec.label_names
    if names is None and isinstance(feature, ClassLabel):
        names = list(feature.names)
    source = splits.get("train", next(iter(splits.values())))
    if names is None and kind in ("string", "large_string"):
        names = sorted({label for label in source["labels"] if label is not None})
    if names is not None:
        count = len(names)
    elif spec.num_labels is not None:
        count = spec.num_labels
    else:
        count = max(2, int(max((label for label in source["labels"] if label is not None), default=0)) + 1)
    if spec.num_labels not in (None, count):
        raise ValueError(f"task {spec.name!r}: num_labels is {spec.num_labels}, but there are {count} label names")
    return replace(spec, problem_type=problem, num_labels=count, label_names=names)


def _encode_labels(spec: TaskSpec, split: str | None, data: Dataset) -> Dataset:
    """Turns labels into class indices or floats, after checking every one of them."""
    where = f"task {spec.name!r}: split {split!r}"
    labels = list(data["labels"])
    if any(label is None for label in labels):
        raise ValueError(f"{where} has examples without a label")
    if spec.problem_type == "regression":
        values = np.asarray(labels, dtype=np.float64)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{where} has labels that are not finite numbers")
        return data.remove_columns("labels").add_column("labels", values.tolist(), feature=Value("float32"))
    if labels and isinstance(labels[0], str):
        index = {name: i for i, name in enumerate(spec.label_names or [])}
        new = sorted(set(labels) - set(index))
        if new:
            raise ValueError(f"{where} has the label {new[0]!r}, which is not among {', '.join(index)}")
        labels = [index[label] for label in labels]
    count = spec.num_labels or 0
    wrong = [label for label in labels if label != int(label) or not 0 <= label < count]
    if wrong:
        raise ValueError(
            f"{where} has {len(wrong)} labels outside 0..{count - 1}, such as {wrong[0]}; "
            "use a labelled split, or set num_labels"
        )
    kind = ClassLabel(names=spec.label_names) if spec.label_names else Value("int64")
    return data.remove_columns("labels").add_column("labels", [int(label) for label in labels], feature=kind)
