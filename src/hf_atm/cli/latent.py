"""`hf-atm latent`: the spaces of several models on one data set, as one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, default_data_collator

from ..checkpoint import write_json
from ..latent import (
    EmbeddingSet,
    LatentSpace,
    aggregate_latent_spaces,
    centroid_accuracy,
    extract_embeddings,
    knn_accuracy,
    linear_cka,
    linear_probe,
    select_anchors,
    separability,
)
from ..latent.aggregation import DUPLICATES, ROUTINGS
from ..latent.anchors import STRATEGIES
from ..latent.extraction import POOLINGS
from ..tasks import TaskData, TaskSpec, load_task
from .commands import load_model
from .console import calm_libraries
from .experiment import (
    IMAGE_KEYS,
    Experiment,
    as_mapping,
    check_keys,
    parse_training,
    read_task,
    read_yaml,
    resolve_reference,
)
from .workbench import build_workbench, check_model


_KEYS = (
    *("data_root", "data", "models", "reference", "anchors", "routing", "duplicates", "standardize"),
    *("batch_size", "seed", "output_dir"),
)
_MODEL_KEYS = ("model", "pooling", "layer", "image", "labels")
_ANCHOR_KEYS = ("num_anchors", "strategy")


@dataclass(frozen=True)
class Encoder:
    """One model of the file: where it is, how its outputs are pooled, and the labels its task has."""

    name: str
    model: str
    pooling: str = "auto"
    layer: int = -1
    image: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class LatentConfig:
    """What a file for `hf-atm latent` says, checked but not loaded."""

    data: TaskSpec
    encoders: tuple[Encoder, ...]
    reference: Encoder | None = None
    num_anchors: int = 256
    strategy: str = "random"
    routing: str = "average"
    duplicates: str = "mean"
    standardize: bool = False
    batch_size: int = 64
    seed: int = 0
    output_dir: str = "runs/latent"


def read_latent_config(path: str | os.PathLike) -> LatentConfig:
    """Reads and checks a YAML file.

    Raises:
        FileNotFoundError: If the file, `data_root` or a local model does not exist.
        KeyError: If a pooling, strategy or routing is unknown.
        ValueError: If a key is unknown or missing, or a value cannot be used.
    """
    raw, folder, root = read_yaml(path, _KEYS, required=("data", "models"))
    data = read_task("data", "data", as_mapping("data", raw["data"]), root)
    if data.train_split is None or data.eval_split is None:
        raise ValueError("data needs train_split, which gives anchors, and eval_split, which is scored")
    if _overlap(data.train_split, data.eval_split):
        raise ValueError(
            f"data.train_split {data.train_split!r} and data.eval_split {data.eval_split!r} share rows, so scores would be "
            "of what was fitted on; name different splits"
        )
    models = as_mapping("models", raw["models"])
    if not models:
        raise ValueError("config names no model; add at least one under models")
    encoders = tuple(_encoder(f"models.{name}", str(name), entry, folder) for name, entry in models.items())
    if "reference" in models:
        raise ValueError("a model is called 'reference', which names the space to compare with; call it otherwise")
    anchors = as_mapping("anchors", raw.get("anchors") or {})
    check_keys("anchors", anchors, _ANCHOR_KEYS)
    values = {key: raw[key] for key in _KEYS[5:] if raw.get(key) is not None}
    config = LatentConfig(
        data,
        encoders,
        reference=_encoder("reference", "reference", raw["reference"], folder) if raw.get("reference") else None,
        **{**anchors, **values},
    )
    _check(config)
    return config


def _encoder(where: str, name: str, entry: Any, folder: Path) -> Encoder:
    values: dict[str, Any] = {"model": entry} if isinstance(entry, str) else dict(as_mapping(where, entry))
    check_keys(where, values, _MODEL_KEYS, required=("model",))
    check_keys(f"{where}.image", values.get("image") or {}, IMAGE_KEYS)
    if values.get("labels") is not None:
        labels = values["labels"]
        if not isinstance(labels, list) or not labels:
            raise ValueError(f"{where}.labels must list the labels of the model's task, not {labels!r}")
        if any(not isinstance(label, (str, int)) for label in labels):
            raise ValueError(f"{where}.labels must be names or numbers, not {labels!r}")
        values["labels"] = tuple(labels)
    _one_of(f"{where}.pooling", values.get("pooling", "auto"), POOLINGS)
    _whole(f"{where}.layer", values.get("layer", -1), None)
    values["model"] = resolve_reference(str(values["model"]), folder)
    return Encoder(name, **values)


def _check(config: LatentConfig) -> None:
    _one_of("anchors.strategy", config.strategy, tuple(STRATEGIES))
    _one_of("routing", config.routing, ROUTINGS)
    _one_of("duplicates", config.duplicates, DUPLICATES)
    _whole("anchors.num_anchors", config.num_anchors, 2)
    _whole("batch_size", config.batch_size, 1)
    _whole("seed", config.seed, 0)
    if not isinstance(config.standardize, bool):
        raise ValueError(f"standardize is {config.standardize!r}; it must be true or false")
    for encoder in config.encoders:
        if config.routing != "average" and encoder.labels is None:
            raise ValueError(
                f"routing {config.routing!r} needs to know what each model was trained on; list the labels of its task "
                f"under models.{encoder.name}.labels"
            )


def _overlap(first: str, second: str) -> bool:
    """Whether one split is the other, or a slice of it; slices of one split are taken at their word."""
    whole = [split.partition("[")[0] for split in (first, second)]
    return first == second or (whole[0] == whole[1] and ("[" not in first or "[" not in second))


def _one_of(where: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise KeyError(f"{where} is {value!r}; known ones are {', '.join(known)}")


def _whole(where: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ValueError(f"{where} is {value!r}; it must be a whole number{'' if least is None else f' from {least}'}")


def latent(path: str, output: str | None = None, quiet: bool = False) -> int:
    """Aggregates the spaces of the models in a YAML file, prints what classes can be read off, and saves the space.

    Written to the output directory: `latent_space.safetensors`, a [`LatentSpace`], and `latent_metrics.json`.

    Args:
        path (`str`): The file.
        output (`str`, *optional*): Replaces its `output_dir`.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar, results only.

    Returns:
        `int`: 0.
    """
    config = read_latent_config(path)
    folder = Path(output or config.output_dir)
    encoders = [*config.encoders, *([config.reference] if config.reference else [])]
    for encoder in encoders:
        check_model(encoder.model)
    calm_libraries()
    _check_data(config, load_task(config.data, config.seed))
    sets: dict[str, EmbeddingSet] = {}
    with tqdm(total=len(encoders), desc="embedding", disable=True if quiet else None) as bar:
        for encoder in encoders:
            bar.set_postfix_str(encoder.name)
            sets[encoder.name] = _embed(config, encoder)
            bar.update()
    reference = sets.pop("reference") if config.reference else None
    train = [name for name in next(iter(sets.values())).ids.tolist() if name.startswith("train/")]
    anchors = select_anchors(list(sets.values()), config.num_anchors, config.strategy, config.seed, candidates=train)
    space = aggregate_latent_spaces(
        list(sets.values()),
        anchors,
        routing=config.routing,
        duplicates=config.duplicates,
        standardize=config.standardize,
        fit_ids=train,
    )
    space.save(folder / "latent_space.safetensors")
    metrics = measure(space, sets, reference, config.seed)
    write_json(
        folder / "latent_metrics.json",
        {
            "config": str(path),
            "models": {encoder.name: encoder.model for encoder in encoders},
            "routing": config.routing,
            "anchors": len(anchors),
            "spaces": metrics,
        },
    )
    print(metric_table(metrics))
    if not quiet:
        print(
            f"\n{len(space)} samples, {len(anchors)} anchors; {folder}/latent_space.safetensors, latent_metrics.json"
        )
    return 0


def _check_data(config: LatentConfig, task: TaskData) -> None:
    """Refuse, before any model runs, what cannot be done with these data."""
    rows = len(task.splits["train"])
    if config.num_anchors >= rows:
        raise ValueError(
            f"anchors.num_anchors is {config.num_anchors}, and train_split {task.spec.train_split!r} has {rows} rows, of "
            "which some must be left to fit on; lower it"
        )
    regression = task.spec.problem_type == "regression"
    if config.strategy == "balanced" and regression:
        raise ValueError("anchors.strategy 'balanced' needs classes, and these data have numbers for labels")
    classes = [_classes(encoder, task.spec) for encoder in config.encoders]
    if config.reference is not None:
        _classes(config.reference, task.spec)
    if config.routing == "oracle":
        known = {int(label) for found in classes if found is not None for label in found}
        alone = sorted(set(range(task.spec.num_labels or 0)) - known)
        if alone:
            names = task.spec.label_names or [str(label) for label in range(task.spec.num_labels or 0)]
            raise ValueError(
                f"routing 'oracle' needs every label in some model's task, and none lists {names[alone[0]]!r}; add it "
                "to the labels of a model"
            )


def _embed(config: LatentConfig, encoder: Encoder) -> EmbeddingSet:
    """A model's space on both splits, samples named by split and row."""
    spec = {"backbone": encoder.model, "image": dict(encoder.image)}
    data = dataclasses.replace(config.data, test_split=None)
    args = parse_training({"seed": config.seed, "output_dir": config.output_dir})
    bench = build_workbench(Experiment(spec, {"data": data}, args), with_model=False)
    model = load_model(encoder.model, causal_lm=False, headless=True)
    (task,) = bench.tasks.values()
    collate = default_data_collator if task.kind == "image" else DataCollatorWithPadding(bench.processing_class)
    rows: ConcatDataset = ConcatDataset([bench.split(part)["data"] for part in ("train", "eval")])
    space = extract_embeddings(
        model,
        DataLoader(rows, batch_size=config.batch_size, collate_fn=collate),
        encoder.pooling,
        encoder.layer,
        device="cuda" if torch.cuda.is_available() else None,
        task=encoder.name,
        progress=False,
    )
    sizes = {part: len(bench.split(part)["data"]) for part in ("train", "eval")}
    ids = [f"{part}/{row:07d}" for part, size in sizes.items() for row in range(size)]
    own, classes = None, _classes(encoder, task.spec)
    if classes is not None and space.labels is not None:
        # Only the oracle knows the task of what is scored.
        known = len(space) if config.routing == "oracle" else sizes["train"]
        own = torch.isin(space.labels, classes) & (torch.arange(len(space)) < known)
    return EmbeddingSet(encoder.name, ids, space.embeddings, space.labels, own)


def _classes(encoder: Encoder, spec: TaskSpec) -> torch.Tensor | None:
    """The labels of a model's task as numbers."""
    if encoder.labels is None:
        return None
    if spec.problem_type == "regression":
        raise ValueError(f"models.{encoder.name}.labels: these data have numbers for labels, not classes")
    count = spec.num_labels or 0
    known: dict[Any, int] = {number: number for number in range(count)}
    known |= {name: number for number, name in enumerate(spec.label_names or ())}
    unknown = [label for label in encoder.labels if label not in known]
    if unknown:
        names = ", ".join(spec.label_names or ()) or f"0 to {count - 1}"
        raise KeyError(f"models.{encoder.name}.labels has the unknown label {unknown[0]!r}; the labels are {names}")
    return torch.tensor([known[label] for label in encoder.labels])


def measure(
    space: LatentSpace, sets: Mapping[str, EmbeddingSet], reference: EmbeddingSet | None, seed: int
) -> dict[str, dict[str, float]]:
    """
    What can be read off the aggregate and off every space it was made from.

    Args:
        space ([`LatentSpace`]):
            The aggregate; its ids start with `train/` or `eval/`. Anchors count as neither.
        sets (`Mapping[str, EmbeddingSet]`):
            The spaces by name.
        reference ([`EmbeddingSet`], *optional*):
            Another space.
        seed (`int`):
            Of the probe.

    Returns:
        `dict`: by space, `separability` of the scored rows whose class has several, `centroid`, `knn` and `probe`, accuracies on them after
        fitting on the others, if there are classes; `cka_merged`, and `cka_reference` if there is one. Spaces of one
        width are joined by the mean of their embeddings, a baseline.
    """
    rest = space.drop(space.anchors)
    fit, score = ([name for name in rest.ids.tolist() if name.startswith(part)] for part in ("train/", "eval/"))
    rows: dict[str, Any] = {f"merged ({len(sets)} spaces)": rest, **sets}
    if len({entry.embeddings.shape[1] for entry in sets.values()}) == 1 and len(sets) > 1:
        total = sum(entry.select(rest.ids).embeddings.double() for entry in sets.values())
        rows["mean of embeddings"] = EmbeddingSet("mean", rest.ids, total / len(sets), rest.labels)
    if reference is not None:
        rows["reference"] = reference
    merged = rest.select(score).embeddings
    result = {}
    for name, entry in rows.items():
        known, scored = entry.select(fit), entry.select(score)
        values: dict[str, float] = {}
        if rest.labels is not None:
            parts = (known.embeddings, known.labels, scored.embeddings, scored.labels)
            spread = _with_spread(scored.labels)
            if spread is not None:
                values["separability"] = separability(scored.embeddings[spread], scored.labels[spread])
            values["centroid"], values["knn"] = centroid_accuracy(*parts), knn_accuracy(*parts)
            values["probe"] = linear_probe(*parts, seed=seed)
        values["cka_merged"] = linear_cka(scored.embeddings, merged)
        if reference is not None:
            values["cka_reference"] = linear_cka(scored.embeddings, reference.select(score).embeddings)
        result[name] = values
    return result


def _with_spread(labels: torch.Tensor) -> torch.Tensor | None:
    """Rows of classes with several samples, which alone have a spread; `None` if those are fewer than two classes."""
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    return counts[index] > 1 if int((counts > 1).sum()) > 1 else None


def metric_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by space as text."""
    columns = list(next(iter(metrics.values())))
    width = max(len("space"), *map(len, metrics))
    heads = [column.replace("_", " to ") if column.startswith("cka") else column for column in columns]
    header = f"{'space':<{width}}  " + "  ".join(f"{head:>8}" for head in heads)
    lines = [header, "-" * len(header)]
    for name, values in metrics.items():
        cells = (f"{values[column]:>{max(8, len(head))}.3f}" for column, head in zip(columns, heads, strict=True))
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)
