"""Backbones: where they come from, the stock classes they belong to, and the way back to stock models.

The pooling and head of a task are not written here: they are those of the class that
`AutoModelForSequenceClassification` or `AutoModelForImageClassification` would build for the backbone's configuration.
It is built on the meta device (no memory, no random numbers) and its backbone is swapped for the shared one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import logging

from .multi_task_config import POOLINGS
from .seeding import derive_seed, isolated_rng


logger = logging.get_logger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_TOWER = "_vision_model"  # suffix of the model types of vision towers: clip_vision_model, siglip_vision_model, ...
_WAY_OUT = f"choose an explicit pooling, one of {', '.join(POOLINGS)} (such heads have no stock export)"


def _first(entry: Any) -> Any:
    # A few families map to several classes (deit: with and without teacher); the Auto classes take the first.
    return entry[0] if isinstance(entry, (list, tuple)) else entry


def _parent_config_class(config: PreTrainedConfig) -> type | None:
    """The class of the two-tower configuration a vision tower belongs to, `CLIPConfig` for `CLIPVisionConfig`."""
    model_type = config.model_type.removesuffix(_TOWER)
    return CONFIG_MAPPING[model_type] if model_type != config.model_type and model_type in CONFIG_MAPPING else None


def stock_class(backbone_config: PreTrainedConfig) -> Any:
    """The class that plain transformers uses to classify with this backbone, or `None` if it has none."""
    key = _parent_config_class(backbone_config) or type(backbone_config)
    for mapping in (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING):
        if key in mapping:
            return _first(mapping[key])
    return None


def stock_config(backbone_config: PreTrainedConfig, spec: dict[str, Any]) -> PreTrainedConfig:
    """The stock model's configuration for one task: the backbone's, with the task's labels and problem type."""
    config = copy.deepcopy(backbone_config)
    if (parent := _parent_config_class(config)) is not None:
        attention = config._attn_implementation
        config = parent(vision_config=config.to_dict())
        config._attn_implementation = attention
    num_labels = spec["num_labels"]
    config.id2label = dict(spec.get("id2label") or {index: f"LABEL_{index}" for index in range(num_labels)})
    config.label2id = dict(spec.get("label2id") or {label: index for index, label in config.id2label.items()})
    config.problem_type = spec.get("problem_type")
    return config


def meta_stock(backbone: PreTrainedModel, spec: dict[str, Any]) -> tuple[PreTrainedModel, str, str]:
    """Builds the stock model of a task on the meta device and finds the backbone in it.

    Args:
        backbone ([`PreTrainedModel`]): The shared backbone.
        spec (`dict`): The task; `num_labels`, and optionally `id2label`, `label2id`, `problem_type`.

    Returns:
        `tuple`: The stock model without memory; the name of its child that stands where the backbone does; and the
        path of the matching module inside `backbone`, empty unless the backbone wraps it (CLIP with projection).

    Raises:
        ValueError: If transformers has no such class, or one that does not wrap this backbone.
    """
    family = type(backbone.config).__name__
    found = stock_class(backbone.config)
    if found is None:
        raise ValueError(f"transformers has no classification class for {family}; {_WAY_OUT}")
    with torch.device("meta"):
        stock = found(stock_config(backbone.config, spec))
    inner = [(name, child) for name, child in backbone.named_children() if isinstance(child, PreTrainedModel)]
    for path, module in [("", backbone), *inner]:
        for name, child in stock.named_children():
            if type(child) is type(module):
                return stock, name, path
    raise ValueError(
        f"{found.__name__} does not wrap a {type(backbone).__name__}, so it cannot be mirrored; {_WAY_OUT}"
    )


def build_backbone(config: PreTrainedConfig, class_name: str | None = None) -> PreTrainedModel:
    """A randomly initialised backbone: `AutoModel`'s class, or the transformers class of the given name."""
    if class_name is None:
        return AutoModel.from_config(config)
    import transformers

    found: Any = getattr(transformers, class_name, None)
    if PreTrainedModel not in getattr(found, "__mro__", ()):
        raise ValueError(f"backbone_class {class_name!r} is not a model class of transformers")
    return found._from_config(config)


def match_structure(backbone: PreTrainedModel, pooling: str | None, seed: int) -> PreTrainedModel:
    """Gives `backbone`, in place, exactly the modules it has inside its stock class (or as a plain `AutoModel`).

    RoBERTa's and ViT's stock classes have no pooler, BERT's does. An unused pooler would be saved, merged and waited
    for by DDP without ever getting a gradient; a missing one could not be loaded back. A pooler that has to be added
    is drawn from `seed`, as the stock class would draw it.

    Raises:
        ValueError: If parameters differ beyond a pooler, as for a backbone that carries adapters.
    """
    if pooling is None:
        stock, name, path = meta_stock(backbone, {"num_labels": 2})
        reference = getattr(stock, name)
    else:
        path = ""
        with torch.device("meta"):
            reference = AutoModel.from_config(copy.deepcopy(backbone.config))
    module = backbone.get_submodule(path)
    like = next(module.parameters())
    for name in {*dict(module.named_children()), *dict(reference.named_children())}:
        ours, theirs = getattr(module, name, None), getattr(reference, name, None)
        if (ours is None) == (theirs is None):
            continue
        if theirs is not None:
            initialize(theirs, module, derive_seed("backbone", seed, name), like)
        setattr(module, name, theirs)
    # Quantised weights have names and shapes of their own and come complete.
    if not getattr(backbone, "is_quantized", False):
        difference = sorted(set(module.state_dict()) ^ set(reference.state_dict()))
        if difference:
            raise ValueError(
                f"this {type(backbone).__name__} and the one transformers builds from its configuration differ in "
                f"{len(difference)} parameters ({difference[0]}, ...); pass a plain backbone, adapters merged"
            )
    return backbone


@torch.no_grad()
def initialize(module: nn.Module, model: PreTrainedModel, seed: int, like: torch.Tensor) -> nn.Module:
    """Draws a meta-device module's weights by `model._init_weights` from `seed`, with dtype and device of `like`.

    The global generators are left as they were. On the meta device (inside `from_pretrained`) nothing is done.
    """
    if like.device.type == "meta":
        return module
    module.to_empty(device="cpu")
    with isolated_rng(seed):
        parts: list[Any] = [*module.modules()]
        for part in reversed(parts):
            model._init_weights(part)
            part._is_hf_initialized = True
    return module.to(device=like.device, dtype=like.dtype)


def take_backbone(module: nn.Module) -> PreTrainedModel:
    """The backbone inside a model with a head, the vision tower of a two-tower model, or the module itself."""
    if not isinstance(module, PreTrainedModel):
        raise ValueError(
            f"from_backbone takes a Hub id, a folder or a transformers model, not a {type(module).__name__}; "
            "call merge_and_unload() first if it carries adapters"
        )
    if f"{module.config.model_type}{_TOWER}" in CONFIG_MAPPING and hasattr(module, "vision_model"):
        return module.vision_model
    auto = MODEL_MAPPING[type(module.config)] if type(module.config) in MODEL_MAPPING else type(module)
    if isinstance(module, tuple(auto) if isinstance(auto, (list, tuple)) else auto):
        return module
    return module.base_model


def load_backbone(
    source: str | os.PathLike | nn.Module, config: Any, dtype: Any, seed: int, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Resolves what `MultiTaskModel.from_backbone` was given; see there."""
    if isinstance(source, nn.Module):
        if config is not None or kwargs:
            named = ", ".join([*(["config"] if config is not None else []), *kwargs])
            raise ValueError(f"{named}: only for a Hub id or folder; a model that is already loaded has its own")
        backbone = take_backbone(source)
        return backbone if dtype in (None, "auto") else backbone.to(dtype)
    if config is not None:
        kwargs = {**kwargs, "config": config}
    model_type = config.model_type if config is not None else _peek_model_type(source, kwargs)
    if model_type == "atm_multi_task":
        raise ValueError(f"{source} holds a multi-task model already; load it with MultiTaskModel.from_pretrained")
    tower = f"{model_type}{_TOWER}"
    loader: Any = _first(MODEL_MAPPING[CONFIG_MAPPING[tower]]) if tower in CONFIG_MAPPING else AutoModel
    # A checkpoint may lack weights (the pooler of a sentence encoder); they are drawn here, so from our seed.
    with isolated_rng(derive_seed("backbone", seed)):
        return loader.from_pretrained(source, dtype="auto" if dtype is None else dtype, **kwargs)


def _peek_model_type(source: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    return PreTrainedConfig.get_config_dict(source, **kwargs)[0].get("model_type")


def to_stock(
    backbone: PreTrainedModel,
    backbone_state: dict[str, torch.Tensor],
    head: nn.Module,
    spec: dict[str, Any],
    pad_token_id: int | None,
) -> PreTrainedModel:
    """A new stock model from the backbone's weights (as given in `backbone_state`) and a stock head's; see
    [`MultiTaskModel.to_task_model`]."""
    pattern: Any
    pattern, name, path = meta_stock(backbone, spec)
    config = pattern.config
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    elif getattr(head, "last_token", False) and config.pad_token_id is None:
        logger.warning(
            f"The exported {type(pattern).__name__} has no pad_token_id and so takes one sequence at a time; "
            "pass to_task_model(..., pad_token_id=tokenizer.pad_token_id) to export one that takes batches."
        )
    # Buffers that are not saved (rotary frequencies, position ids) are computed here; all else is loaded below.
    with isolated_rng(), no_init_weights():
        stock = type(pattern)._from_config(config, dtype=backbone.dtype)
    prefix = f"{path}." if path else ""
    state = {
        f"{name}.{key.removeprefix(prefix)}": value for key, value in backbone_state.items() if key.startswith(prefix)
    }
    state.update(head.state_dict())
    try:
        stock.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights do not fit {type(stock).__name__}, as when adapters are attached; call merge_and_unload() "
            f"on the PEFT model, then to_task_model ({str(error).splitlines()[-1].strip()})"
        ) from error
    stock.tie_weights()
    return stock.to(backbone.device).eval()


def check_zero_shot_specs(tasks: dict[str, dict[str, Any]]) -> None:
    """Raises a `ValueError` for a zero-shot task without labels or with a template that has no `{}`."""
    for name, spec in tasks.items():
        if not isinstance(spec, dict) or not spec.get("labels"):
            raise ValueError(f'zero-shot task {name!r} needs "labels", the list of its class names')
        templates = spec.get("templates", DEFAULT_TEMPLATES)
        bad = [templates] if isinstance(templates, str) else [text for text in templates if "{}" not in text]
        if bad or not templates:
            raise ValueError(f'task {name!r}: "templates" is a list of texts, each with {{}} for the label, not {bad}')


@torch.no_grad()
def text_features(
    clip: PreTrainedModel, tokenizer: Callable[..., Any], labels: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Normalised text features of each label: the mean over templates of normalised features, normalised again.

    Args:
        clip ([`PreTrainedModel`]): A model with `get_text_features`.
        tokenizer (`Callable`): A tokenizer or processor, called with `text=`.
        labels (`Sequence[str]`): Class names.
        templates (`Sequence[str]`): Prompts with `{}` in the label's place.

    Returns:
        `torch.Tensor` of shape `(num_labels, projection_dim)`: Unit vectors, in the model's dtype.
    """
    was_training = clip.training
    clip.eval()
    rows = []
    for label in labels:
        batch = tokenizer(text=[text.replace("{}", label) for text in templates], padding=True, return_tensors="pt")
        features = clip.get_text_features(**batch.to(clip.device)).pooler_output
        features = (features / features.norm(dim=-1, keepdim=True)).mean(0)
        rows.append(features if len(templates) == 1 else features / features.norm())
    clip.train(was_training)
    return torch.stack(rows)


def load_clip(source: str | os.PathLike | PreTrainedModel, dtype: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A CLIP-like model from an id, a folder or itself; errors if it has no image projection to build on."""
    if isinstance(source, PreTrainedModel):
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: only for a Hub id or folder, not for a model already loaded")
        clip = source if dtype in (None, "auto") else source.to(dtype)
    else:
        clip = AutoModel.from_pretrained(source, dtype="auto" if dtype is None else dtype, **kwargs)
    if not hasattr(clip, "visual_projection") or not hasattr(clip, "logit_scale"):
        raise ValueError(
            f"zero-shot heads need a CLIPModel or MetaClip2Model, not a {type(clip).__name__}; "
            "use from_backbone for trained heads"
        )
    return clip


def load_tokenizer(source: Any, tokenizer: Any, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The given tokenizer or processor, else the one saved with the model's id or folder."""
    if tokenizer is not None:
        return tokenizer
    if isinstance(source, PreTrainedModel):
        raise ValueError("from_clip needs tokenizer= (or processor=) when it is given a model that is already loaded")
    hub = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")
    return AutoTokenizer.from_pretrained(source, **{name: kwargs[name] for name in hub if name in kwargs})


def vision_backbone(clip: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The image tower with its projection as one backbone, sharing `clip`'s modules, and its class name."""
    class_name = type(clip).__name__.removesuffix("Model") + "VisionModelWithProjection"
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim  # the tower's own value is a default that nothing reads
    with torch.device("meta"):
        backbone = build_backbone(config, class_name)
    backbone.vision_model, backbone.visual_projection = clip.vision_model, clip.visual_projection
    return backbone, class_name


def to_clip(backbone: PreTrainedModel, state: dict[str, torch.Tensor], clip: Any) -> PreTrainedModel:
    """`clip` (a model, id or folder) with the image tower and projection of `state`; see
    [`MultiTaskModel.to_clip_model`]."""
    if not isinstance(clip, PreTrainedModel):
        clip = AutoModel.from_pretrained(clip, dtype=backbone.dtype)
    try:
        missing, unexpected = clip.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the image tower does not fit this {type(clip).__name__}: {error}") from error
    if unexpected:
        raise ValueError(f"this {type(clip).__name__} has no {unexpected[0]}; give the CLIP model it was built from")
    return clip.eval()
