"""The loaded parts of an experiment: data, model, processor, metrics."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..tasks import TaskData, load_task, make_image_processor, prepare_causal_lm, prepare_images, prepare_text
from .experiment import Experiment, as_mapping, check_keys


@dataclass
class Workbench:
    """The loaded parts of an experiment, as `ATMTrainer` takes them."""

    model: Any
    tasks: dict[str, TaskData]
    processing_class: Any
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)

    def split(self, part: str) -> dict[str, Any]:
        """The data sets of one part (`"train"`, `"eval"` or `"test"`) by task."""
        return {name: task.splits[part] for name, task in self.tasks.items() if part in task.splits}


def build_workbench(
    experiment: Experiment, model: Any = None, with_model: bool = True, adapt: bool = False
) -> Workbench:
    """Loads data, model and processor.

    Args:
        experiment (`Experiment`): A checked experiment.
        model (`PreTrainedModel`, *optional*): Use this one, saved with its processor, rather than the experiment's.
        with_model (`bool`, *optional*, defaults to `True`): `False` loads data and processor alone.
        adapt (`bool`, *optional*, defaults to `False`): Put the experiment's adapter on a given model too.

    Returns:
        `Workbench`: its `trainer_kwargs` hold collator, metrics and PEFT configuration.
    """
    from transformers import AutoTokenizer, default_data_collator, set_seed

    set_seed(experiment.args.seed)
    spec, causal_lm = experiment.model, "causal_lm" in experiment.model
    source = model.name_or_path if model is not None else spec.get("backbone", spec.get("causal_lm"))
    if source is not None:
        check_model(source)
    kwargs: dict[str, Any] = {}
    if spec.get("peft") and (model is None or adapt):
        kwargs["peft_config"] = build_peft_config(spec["peft"], causal_lm)
    tasks = {name: load_task(task, experiment.args.seed, causal_lm) for name, task in experiment.tasks.items()}
    kinds = {task.kind for task in tasks.values()}
    if len(kinds) > 1:
        raise ValueError(f"the tasks mix {' and '.join(sorted(kinds))} data, and one backbone takes one kind")
    (kind,) = kinds
    if kind == "image":
        processor = image_processor(source, spec.get("image") or {}, spec.get("config") or {})
        channels = int((spec.get("image") or {}).get("channels", 3))
        tasks = {name: prepare_images(task, processor, channels) for name, task in tasks.items()}
        kwargs["data_collator"] = default_data_collator
    else:
        if source is None:
            raise ValueError("text tasks need model.backbone or model.causal_lm, whose tokenizer they use")
        processor = AutoTokenizer.from_pretrained(source)
        processor.pad_token = processor.pad_token or processor.eos_token
        prepare = prepare_causal_lm if causal_lm else prepare_text
        tasks = {name: prepare(task, processor) for name, task in tasks.items()}
    if causal_lm:
        from ..metrics import compute_causal_lm_metrics, preprocess_causal_lm_logits

        kwargs["data_collator"] = default_data_collator
        kwargs["compute_metrics"] = compute_causal_lm_metrics
        kwargs["preprocess_logits_for_metrics"] = preprocess_causal_lm_logits
    else:
        kwargs["compute_metrics"] = {name: task.compute_metrics for name, task in tasks.items()}
    if model is None and with_model:
        model = build_model(spec, tasks)
    return Workbench(model, tasks, processor, kwargs)


def keep_heads(model: Any, tasks: Collection[str]) -> None:
    """Drops the heads of other tasks from a multi-task model; a model without heads stays as it is."""
    heads = getattr(model, "heads", {})
    for task in set(heads) - set(tasks):
        del heads[task]
    if heads:
        model.config.tasks = {task: spec for task, spec in model.config.tasks.items() if task in heads}


def check_model(source: str) -> Any:
    """The configuration of a model, a folder or a Hub id.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its architecture is unknown to transformers, or it is an adapter.
    """
    from transformers import AutoConfig

    if os.path.isfile(os.path.join(source, "adapter_config.json")):
        raise ValueError(
            f"model {source!r} is an adapter without its base; load it with PEFT, call merge_and_unload() and save that"
        )
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        where = "as a folder with a config.json" if os.path.isdir(source) else "as a folder or on the Hub"
        raise FileNotFoundError(f"model {source!r} was not found {where}") from error


def build_peft_config(values: Mapping[str, Any], causal_lm: bool) -> Any:
    """A `LoraConfig` from a mapping, whose unknown keys are an error; on all linear layers unless it says otherwise."""
    from peft import LoraConfig

    values = as_mapping("model.peft", values)
    check_keys("model.peft", values, [f.name for f in fields(LoraConfig) if f.init])
    defaults: dict[str, Any] = {"task_type": "CAUSAL_LM"} if causal_lm else {}
    if not values.get("target_parameters"):
        defaults["target_modules"] = "all-linear"
    return LoraConfig(**{**defaults, **values})


def build_model(spec: Mapping[str, Any], tasks: Mapping[str, TaskData], seed: int | None = None) -> Any:
    """The model of an experiment.

    Args:
        spec (`Mapping[str, Any]`): `model` of an [`Experiment`].
        tasks (`Mapping[str, TaskData]`): the loaded tasks, whose heads it gets.
        seed (`int`, *optional*): decides heads and, without pretrained weights, everything else; by default the
            present global seed does.
    """
    import torch
    from transformers import set_seed

    if seed is not None:
        set_seed(seed)
    heads = {name: task.head for name, task in tasks.items()}
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if "causal_lm" in spec:
        return AutoModelForCausalLM.from_pretrained(spec["causal_lm"], dtype=torch.float32)
    from ..modeling import MultiTaskModel

    source: Any = spec.get("backbone")
    if source is None:
        values = dict(as_mapping("model.config", spec["config"]))
        source = AutoModel.from_config(AutoConfig.for_model(values.pop("model_type", ""), **values))
    options = {"pooling": spec["pooling"]} if spec.get("pooling") else {}
    return MultiTaskModel.from_backbone(source, tasks=heads, **options)


def image_processor(source: str | None, image: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The image processor of a model, or one for the `image` section of a file."""
    from transformers import AutoImageProcessor

    if source is not None and not image:
        try:
            return AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {source!r} brings no image processor; add image: {{size: ..., channels: 3}} under model"
            ) from error
    size = image.get("size", config.get("image_size"))
    if size is None:
        raise ValueError("model.image.size is missing; give the side of the images in pixels")
    return make_image_processor(
        int(size), int(image.get("channels", 3)), image.get("mean", 0.5), image.get("std", 0.5)
    )
