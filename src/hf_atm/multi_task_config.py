"""What a task is: its specification in the configuration, the labels it takes, and its loss."""

from __future__ import annotations

import copy
import numbers
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


POOLINGS = ("cls", "mean", "last_token", "pooler", "image_pool")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def normalize_task(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Checks a task's name and specification and fills in what follows from it.

    Args:
        name (`str`): The task's name.
        spec (`dict`): `num_labels` (or `labels`, `id2label`, `label2id`, from which it follows) and optionally
            `problem_type`, `head` (`"zero_shot"` or `"prototypical"`) and entries of your own. One label without a
            problem type is a regression, as in transformers. A prototypical head needs `k_shot` and `n_query`, and may
            have `n_way`, `pooling`, `scale` and `distance`; see [`PrototypicalTaskHead`].

    Returns:
        `dict`: The specification with `num_labels` and, where labels are named, `id2label` and `label2id`.

    Raises:
        ValueError: If the name or an entry is unusable.
    """
    if not isinstance(name, str) or not name.strip() or "." in name or "/" in name:
        raise ValueError(f'task name {name!r} must be a non-empty text without "." and "/"; rename the task')
    if hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(f"task name {name!r} is taken by a method of torch.nn.ModuleDict; rename the task")
    if not isinstance(spec, dict):
        raise ValueError(f'task {name!r} must be a dict such as {{"num_labels": 2}}, not {spec!r}')
    spec = copy.deepcopy(spec)
    if (labels := spec.pop("labels", None)) is not None:
        spec["id2label"] = dict(enumerate(labels))
    elif spec.get("id2label") is None and spec.get("label2id") is not None:
        spec["id2label"] = {index: label for label, index in spec["label2id"].items()}
    if spec.get("id2label") is not None:
        spec["id2label"] = {int(index): label for index, label in sorted(spec["id2label"].items(), key=_index)}
        spec["label2id"] = {label: index for index, label in spec["id2label"].items()}
        if len(spec["label2id"]) < len(spec["id2label"]) or [*spec["id2label"]] != [*range(len(spec["id2label"]))]:
            raise ValueError(f"task {name!r}: labels must be distinct and numbered from 0, not {spec['id2label']}")
        spec.setdefault("num_labels", len(spec["id2label"]))
    num_labels = spec.get("num_labels")
    if not isinstance(num_labels, numbers.Integral) or isinstance(num_labels, bool) or num_labels < 1:
        raise ValueError(f"task {name!r}: num_labels must be a whole number from 1, not {num_labels!r}")
    spec["num_labels"] = num_labels = int(num_labels)
    if spec.get("id2label") is not None and len(spec["id2label"]) != num_labels:
        raise ValueError(f"task {name!r}: num_labels is {num_labels}, but there are {len(spec['id2label'])} labels")
    problem_type = spec.get("problem_type")
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"task {name!r}: unknown problem_type {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}")
    if problem_type is None and num_labels == 1:
        problem_type = "regression"
    if problem_type == "single_label_classification" and num_labels == 1:
        raise ValueError(f"task {name!r}: single_label_classification needs num_labels of 2 or more")
    if spec.get("head") not in (None, "zero_shot", "prototypical"):
        raise ValueError(
            f"task {name!r}: unknown head {spec['head']!r}; leave it out, or use zero_shot or prototypical"
        )
    spec["problem_type"] = problem_type
    if spec.get("head") == "prototypical":
        spec = _with_episodes(name, spec)
    elif (
        stray := next((key for key in ("n_way", "k_shot", "n_query") if spec.get(key) is not None), None)
    ) is not None:
        raise ValueError(f"task {name!r}: {stray} belongs to episodes; add head: prototypical, or remove it")
    return spec


def _with_episodes(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The specification of a prototypical head, checked and completed."""
    if spec["problem_type"] not in (None, "single_label_classification"):
        raise ValueError(
            f"task {name!r}: a prototypical head tells classes apart, and the task is a {spec['problem_type']}; leave "
            "head out"
        )
    spec = {"scale": "auto", "distance": "sqeuclidean", **spec, "problem_type": "single_label_classification"}
    if spec.get("n_way") is None:
        spec["n_way"] = spec["num_labels"]
    for key, least in (("n_way", 2), ("k_shot", 1), ("n_query", 1)):
        value = spec.get(key)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"task {name!r}: a prototypical head needs {key}, a whole number from {least}, not {value!r}"
            )
        spec[key] = int(value)
    if spec["n_way"] > spec["num_labels"]:
        raise ValueError(f"task {name!r}: n_way is {spec['n_way']}, but there are {spec['num_labels']} classes")
    if spec.get("pooling") not in (None, *POOLINGS):
        raise ValueError(f"task {name!r}: unknown pooling {spec['pooling']!r}; known: {', '.join(POOLINGS)}")
    from .fewshot.heads import check_scale  # few-shot models build on this module

    try:
        check_scale(spec["scale"], spec["distance"])
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from None
    return spec


def _index(item: tuple[Any, Any]) -> int:
    return int(item[0])  # JSON turns the numbers of id2label into texts


class MultiTaskConfig(PreTrainedConfig):
    """Configuration of a [`MultiTaskModel`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): The shared backbone's configuration.
        tasks (`dict[str, dict]`, *optional*): One specification per task; see [`normalize_task`].
        pooling (`str`, *optional*): `None` mirrors the stock classification class of the backbone's family;
            `"cls"`, `"mean"`, `"last_token"`, `"pooler"` or `"image_pool"` put a linear head on that pooling instead.
        feature_size (`int`, *optional*): Width of the pooled features, where the backbone's configuration is silent.
        backbone_class (`str`, *optional*): The backbone's transformers class, if not `AutoModel`'s.
        task_specific_modules (`list[str]`, *optional*): Patterns of backbone parameters kept per task.
        base_model_name_or_path (`str`, *optional*): Where the backbone came from.
        task_order (`list[str]`, *optional*): Kept by the class: JSON files sort `tasks` by name, and the order of
            heads is that of the optimizer's parameters.
    """

    model_type = "atm_multi_task"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }

    backbone_config: PreTrainedConfig | dict | None = None
    tasks: dict | None = None
    pooling: str | None = None
    feature_size: int | None = None
    backbone_class: str | None = None
    task_specific_modules: list | None = None
    base_model_name_or_path: str | None = None
    task_order: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        tasks = {name: normalize_task(name, spec) for name, spec in (self.tasks or {}).items()}
        order = [name for name in self.task_order or [] if name in tasks]
        self.tasks = {name: tasks[name] for name in [*order, *(name for name in tasks if name not in order)]}
        self.task_order = list(self.tasks)
        self.task_specific_modules = list(self.task_specific_modules or [])
        if self.pooling not in (None, *POOLINGS):
            raise ValueError(
                f"unknown pooling {self.pooling!r}; leave it out to mirror the stock class, or choose one of "
                f"{', '.join(POOLINGS)}"
            )
        super().__post_init__(**kwargs)


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Mean loss over the batch, in fp32: squared error, cross-entropy, or binary cross-entropy per label.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Outputs of a head.
        labels (`torch.Tensor`): Of shape `(batch_size,)`, or `(batch_size, num_labels)` for several numbers or labels.
        problem_type (`str`, *optional*): `None` decides by the labels' dtype, as transformers does: integers are
            classes, floats are several labels.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    if problem_type is None:
        problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem_type == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.view(-1).long())
    labels = labels.float().view(logits.shape)  # never broadcast: (n,) against (n, 1) would average n * n errors
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def check_labels(task: str, labels: Any, num_labels: int, problem_type: str | None) -> None:
    """See [`MultiTaskModel.check_labels`]."""
    values = (
        labels.detach().cpu().float() if isinstance(labels, torch.Tensor) and labels.is_floating_point() else labels
    )
    try:
        values = np.asarray(values)
    except ValueError:
        raise ValueError(f"task {task!r}: labels have differing lengths; give each example {num_labels}") from None
    if values.size == 0:
        return
    if problem_type is None:
        problem_type = "multi_label_classification" if values.dtype.kind == "f" else "single_label_classification"
    single = problem_type == "single_label_classification"
    wanted = {
        "regression": "finite numbers",
        "multi_label_classification": f"{num_labels} numbers from 0 to 1 per example",
        "single_label_classification": f"whole numbers from 0 to {num_labels - 1}",
    }[problem_type]
    if values.dtype.kind not in ("iu" if single else "iuf" if problem_type == "regression" else "iufb"):
        example = values.reshape(-1)[0]
        raise ValueError(f"task {task!r}: label {example!r} has type {values.dtype}, but its head needs {wanted}")
    shapes: tuple = ((len(values), num_labels),)
    if single or (problem_type == "regression" and num_labels == 1):
        shapes = ((len(values),), (len(values), 1))
    if values.shape not in shapes:
        raise ValueError(f"task {task!r}: labels have shape {values.shape}, but its head needs {shapes[0]}: {wanted}")
    if problem_type == "regression":
        bad = ~np.isfinite(values)
    else:
        bad = ~((values >= 0) & (values <= (num_labels - 1 if single else 1)))
    if bad.any():
        raise ValueError(f"task {task!r}: label {values[bad][0].item()} is out of range, its head needs {wanted}")
