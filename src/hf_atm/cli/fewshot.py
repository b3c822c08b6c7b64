"""`hf-atm fewshot`: train on episodes of base classes, test on novel ones."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint import write_json
from ..fewshot import FewShotConfig, FewShotModel, FewShotTrainer, GINEncoder, check_class_split, evaluate_episodes
from ..fewshot.baselines import finetune_baseline, probe_episodes
from ..fewshot.descriptors import node_statistics
from ..fewshot.episodes import EpisodeSampler, class_indices, labels_of
from ..fewshot.graph_sets import load_graph_set, load_tu_dataset
from ..fewshot.graphs import GraphDataset
from ..seeding import derive_seed, isolated_rng
from ..tasks import TaskSpec, load_task, prepare_images, prepare_text
from .commands import resume_value
from .console import calm_libraries
from .experiment import as_mapping, check_keys, parse_training, read_yaml, resolve_dataset, resolve_reference
from .progress import calm_trainer
from .workbench import check_model, image_processor


RESULT_NAME = "few_shot.json"
_TOP_KEYS = ("model", "data", "data_root", "training", "seeds", "test_episodes", "baselines")
_GIN_KEYS = ("encoder", "hidden_size", "num_layers", "pooling", "dropout", "norm")
_BACKBONE_KEYS = ("backbone", "pooling", "image")
_GRAPH_KEYS = ("graphs", "features", "walk_length")
_TU_KEYS = ("tu_dataset", "features", "walk_length", "base", "novel", "validation")
# What a task of ATM says beside its data; here `training` says it, or nothing does.
_NOT_OF_DATA = ("name", "problem_type", "metrics", "head", "n_way", "k_shot", "n_query")
_BASELINES = ("untrained", "finetune", "node_statistics")


@dataclass
class FewShotExperiment:
    """What a YAML file says, checked but not yet loaded.

    Args:
        model (`dict`): `encoder: gin` with its settings, or a `backbone` with its pooling.
        data (`dict`): A folder of `graphs`, a `tu_dataset`, or a `dataset` with `base` and `novel` classes.
        args ([`FewShotConfig`]): Settings of training.
        seeds (`list[int]`): One training each.
        test_episodes (`int`): Episodes of novel classes.
        baselines (`list[str]`): What else to score.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    args: FewShotConfig
    seeds: list[int]
    test_episodes: int = 5000
    baselines: list[str] = field(default_factory=list)


@dataclass
class _Data:
    """Base classes to train and validate on, novel ones to test on."""

    train: Any
    validation: Any
    test: Any
    base: list[int]
    novel: list[int]
    collator: Callable | None = None
    processing_class: Any = None


def read_few_shot(path: str | os.PathLike, overrides: Sequence[str] = ()) -> FewShotExperiment:
    """Reads and checks a YAML file.

    Args:
        path (`str` or `os.PathLike`): The file; its paths are read as those of `hf-atm train`.
        overrides (`Sequence[str]`, *optional*): `--field value` of [`FewShotConfig`] that replace its settings.

    Raises:
        FileNotFoundError: If the file, `data_root` or a local backbone does not exist.
        ValueError: If a key is unknown or missing, or a value is not usable.
    """
    raw, folder, root = read_yaml(path, _TOP_KEYS, required=("model", "data"))
    data, model = dict(as_mapping("data", raw["data"])), dict(as_mapping("model", raw["model"]))
    kinds = [key for key in ("graphs", "tu_dataset", "dataset") if key in data]
    if len(kinds) != 1:
        raise ValueError(f"data needs exactly one of graphs, tu_dataset and dataset, and has {len(kinds)} of them")
    (kind,) = kinds
    if kind == "dataset":
        known = tuple(f.name for f in fields(TaskSpec) if f.name not in _NOT_OF_DATA)
        check_keys("data", data, (*known, "base", "novel"), required=("base", "novel"))
        check_keys("model", model, _BACKBONE_KEYS, required=("backbone",))
        model["backbone"] = resolve_reference(model["backbone"], folder)
    else:
        check_keys("data", data, _GRAPH_KEYS if kind == "graphs" else _TU_KEYS)
        check_keys("model", model, _GIN_KEYS, required=("encoder",))
        if model["encoder"] != "gin":
            raise ValueError(f"model.encoder is {model['encoder']!r}; graphs are encoded by gin")
    for part in ("base", "novel"):
        if not isinstance(data.get(part, []), list):
            raise ValueError(f"data.{part} must be a list of classes, not {data[part]!r}")
    if kind != "graphs":
        check_class_split(data.get("base", ()), data.get("novel", ()))
    data[kind] = resolve_dataset(str(data[kind]), root) if kind != "tu_dataset" else data[kind]
    if kind == "tu_dataset":
        check_keys("data", data, _TU_KEYS, required=("base", "novel"))
        data["root"] = str(root)
    baselines = list(raw.get("baselines", ["untrained"]) or [])
    for name in baselines:
        if name not in _BASELINES:
            raise ValueError(f"baselines has the unknown entry {name!r}; known: {', '.join(_BASELINES)}")
    if "node_statistics" in baselines and kind == "dataset":
        raise ValueError("the baseline node_statistics is for graphs; leave it out of baselines")
    if "finetune" in baselines and model.get("norm") == "episode":
        raise ValueError("the baseline finetune needs embeddings of single graphs; leave it out, or use norm: graph")
    training = dict(as_mapping("training", raw.get("training") or {}))
    training.setdefault("disable_tqdm", False)
    training.setdefault("eval_strategy", "epoch")
    if training.get("patience") is not None:
        training.setdefault("save_strategy", "epoch")
        training.setdefault("save_total_limit", 1)
    args = parse_training(training, overrides, FewShotConfig)
    seeds = raw.get("seeds", [args.seed])
    if not isinstance(seeds, list) or not seeds or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise ValueError(f"seeds must be a list of whole numbers, not {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, not {seeds!r}")
    resume = resume_value(args.resume_from_checkpoint)
    if isinstance(resume, str) and len(seeds) > 1:
        raise ValueError(
            f"resume_from_checkpoint={resume!r} belongs to one of {len(seeds)} seeds; use true, and each goes on from its own"
        )
    episodes = raw.get("test_episodes", 5000)
    if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 2:
        raise ValueError(f"test_episodes is {episodes!r}; use a whole number from 2")
    return FewShotExperiment(model, data, args, seeds, episodes, baselines)


def few_shot(config: str, overrides: Sequence[str] = (), quiet: bool = False) -> int:
    """Trains and tests as a YAML file says, prints a table and leaves `few_shot.json` and a model per seed.

    Args:
        config (`str`): The file.
        overrides (`Sequence[str]`, *optional*): `--field value` of [`FewShotConfig`].
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.

    Returns:
        `int`: 0.
    """
    experiment: Any = read_few_shot(config, overrides)
    calm_libraries()
    data = _load(experiment)
    args: Any = experiment.args
    parts = {"train": data.base, "validation": data.base, "test": data.novel}
    for part, classes in parts.items():
        # Whether they suffice must not come to light after training.
        try:
            EpisodeSampler(labels_of(getattr(data, part)), args.n_way, args.k_shot, args.n_query, 1, classes)
        except ValueError as error:
            raise ValueError(f"{part} data: {error}") from None
    output = Path(args.output_dir)
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for seed in experiment.seeds:
        folder = output if len(experiment.seeds) == 1 else output / f"seed-{seed}"
        args = dataclasses.replace(experiment.args, seed=seed, output_dir=str(folder), disable_tqdm=quiet)
        for name, scores in _run(experiment, data, args).items():
            rows.setdefault(name, {})[seed] = scores
    write_json(output / RESULT_NAME, {"n_way": args.n_way, "k_shot": args.k_shot, "rows": rows})
    print(few_shot_table(rows, f"{args.n_way}-way {args.k_shot}-shot"))
    print(f"\n{output / RESULT_NAME}; the model is in {folder if len(experiment.seeds) == 1 else output / 'seed-*'}")
    return 0


def few_shot_table(rows: Mapping[str, Mapping[int, Mapping[str, float]]], title: str) -> str:
    """Scores on novel classes, means over seeds, with the interval over episodes and the spread over seeds."""
    width = max(map(len, [title, *rows]))
    lines = [f"{title:<{width}}  accuracy  95 % interval  macro-F1  seeds (deviation)"]
    lines.append("-" * len(lines[0]))
    for name, by_seed in rows.items():
        mean = {key: statistics.fmean(s[key] for s in by_seed.values()) for key in ("accuracy", "ci95", "macro_f1")}
        spread = statistics.stdev(s["accuracy"] for s in by_seed.values()) if len(by_seed) > 1 else None
        seeds = str(len(by_seed)) if spread is None else f"{len(by_seed)} ({spread:.3f})"
        lines.append(
            f"{name:<{width}}  {mean['accuracy']:>8.3f}  {'± ' + format(mean['ci95'], '.3f'):>13}  "
            f"{mean['macro_f1']:>8.3f}  {seeds}"
        )
    return "\n".join(lines)


def _load(experiment: FewShotExperiment) -> _Data:
    spec = experiment.data
    if "graphs" in spec or "tu_dataset" in spec:
        options = {key: spec[key] for key in ("features", "walk_length", "validation") if key in spec}
        if "graphs" in spec:
            graphs = load_graph_set(spec["graphs"], **options)
        else:
            graphs = load_tu_dataset(spec["tu_dataset"], spec["root"], spec["base"], spec["novel"], **options)
        return _Data(graphs.train, graphs.validation, graphs.test, graphs.base, graphs.novel)
    from transformers import AutoTokenizer, DataCollatorWithPadding, default_data_collator

    check_model(experiment.model["backbone"])
    given = {key: value for key, value in spec.items() if key not in ("base", "novel")}
    task = load_task(TaskSpec(name="data", problem_type="single_label_classification", **given))
    names = task.spec.label_names
    base, novel = (class_indices(spec[part], names, f"data.{part}") for part in ("base", "novel"))
    check_class_split(base, novel)
    processor: Any
    collator: Callable
    if task.kind == "image":
        image = experiment.model.get("image") or {}
        processor = image_processor(experiment.model["backbone"], image, {})
        task = prepare_images(task, processor, int(image.get("channels", 3)))
        collator = default_data_collator
    else:
        processor = AutoTokenizer.from_pretrained(experiment.model["backbone"])
        processor.pad_token = processor.pad_token or processor.eos_token
        task = prepare_text(task, processor)
        collator = DataCollatorWithPadding(processor)
    parts = task.splits
    if "train" not in parts or "eval" not in parts:
        raise ValueError("data needs train_split and eval_split, to train and to validate on")
    return _Data(parts["train"], parts["eval"], parts.get("test", parts["eval"]), base, novel, collator, processor)


def _encoder(model: Mapping[str, Any], data: _Data, seed: int) -> Any:
    if "backbone" in model:
        from transformers import AutoModel

        return AutoModel.from_pretrained(model["backbone"])
    settings = {key: value for key, value in model.items() if key != "encoder"}
    with isolated_rng(derive_seed("encoder", seed)):
        return GINEncoder(data.train.features.size, **settings)


def _run(experiment: FewShotExperiment, data: _Data, args: FewShotConfig) -> dict[str, dict[str, float]]:
    """One seed: scores on novel classes by row."""
    pooling = experiment.model.get("pooling", "mean")
    encoder = _encoder(experiment.model, data, args.seed)
    # First, since it knows best what it cannot do.
    trainer = FewShotTrainer(
        encoder,
        args,
        data.collator,
        data.train,
        data.validation,
        train_classes=data.base,
        eval_classes=data.base,
        pooling=pooling,
        processing_class=data.processing_class,
    )
    rows: dict[str, dict[str, float]] = {}
    common = (args.n_way, args.k_shot, args.n_query, experiment.test_episodes, data.novel, args.seed)

    def score(model: FewShotModel) -> dict[str, float]:
        return evaluate_episodes(model, data.test, *common, data.collator, args.per_device_eval_batch_size)

    if "node_statistics" in experiment.baselines:
        assert isinstance(data.test, GraphDataset)
        statistics_of_nodes = node_statistics(data.test, walk_length=data.test.features.walk_length)
        rows["node statistics"] = probe_episodes(statistics_of_nodes, data.test.labels, *common)
    if "finetune" in experiment.baselines:
        rows["fine-tuned classifier"] = finetune_baseline(
            encoder,
            args,
            data.train,
            data.test,
            data.collator,
            data.base,
            data.novel,
            experiment.test_episodes,
            pooling=pooling,
        )
    if "untrained" in experiment.baselines:
        plain = FewShotModel.from_encoder(copy.deepcopy(encoder), pooling, scale="auto")
        rows["before training"] = score(plain.to(args.device))
    calm_trainer(trainer)
    if not args.disable_tqdm:
        trainer.add_callback(_Bar())
    resume = resume_value(args.resume_from_checkpoint)
    if resume is True and len(experiment.seeds) > 1:
        # A seed that was not begun has nothing to go on from.
        resume = os.path.isdir(args.output_dir) and get_last_checkpoint(args.output_dir) is not None
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    rows["trained"] = score(trainer.model)
    return rows


class _Bar(ProgressCallback):
    """The Trainer's own bar, without a line for every log."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass
