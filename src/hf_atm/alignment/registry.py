"""Specifications by `config.model_type`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from ..merging.tensors import nearest
from .spec import PermutationSpec


# builder(config, names) -> PermutationSpec; names are those of the model's tensors, empty where only a configuration is known.
Builder = Callable[[Any, Collection[str]], PermutationSpec]

_BUILDERS: dict[str, Builder] = {}

_ALIBI = "its heads carry fixed slopes (ALiBi) and may not change places"
_BIAS_TABLE = "its tables of relative positions tie heads together in a way that no specification here describes"
_ROUTER = "a router ties its experts to rows of another tensor"
_DEPTHWISE = "its convolutions are grouped or depthwise"
_UNSUPPORTED = {
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "swin", "swinv2", "beit", "mpnet"), _BIAS_TABLE),
    **dict.fromkeys(("deberta", "deberta-v2"), _BIAS_TABLE),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "switch_transformers"), _ROUTER),
    **dict.fromkeys(("convnext", "convnextv2", "regnet", "mobilenet_v1", "mobilenet_v2", "efficientnet"), _DEPTHWISE),
}


def register_permutation_spec(model_type: str, builder: Builder, overwrite: bool = False) -> None:
    """
    Makes a family's specification known to [`spec_for`] and [`align`].

    Args:
        model_type (`str`):
            The family, as in `config.model_type`.
        builder (`Callable`):
            `builder(config, names) -> PermutationSpec`; `names` are those of the model's tensors, and empty where only
            a configuration is known.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a known family may be replaced.

    Raises:
        `ValueError`: if the family is known already.
    """
    if model_type in _BUILDERS and not overwrite:
        raise ValueError(f"Family '{model_type}' has a specification already; pass overwrite=True to replace it.")
    _BUILDERS[model_type] = builder


def spec_for(model: Any) -> PermutationSpec:
    """
    The permutation symmetries of a transformers model.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`):
            A model, which tells its heads too, or its configuration. A [`MultiTaskModel`] has its backbone's
            symmetries; its heads are mapped but not matched.

    Returns:
        [`PermutationSpec`]

    Raises:
        `KeyError`: for a family without specification.
        `ValueError`: for a family that none can describe, or a model without `config.model_type`.
    """
    names = list(model.state_dict()) if isinstance(model, nn.Module) else []
    config = getattr(model, "config", model)
    if not isinstance(getattr(config, "model_type", None), str):
        raise ValueError(
            f"A {type(model).__name__} has no config.model_type; pass spec=, a PermutationSpec or what mlp_spec, "
            "resnet_spec or vgg_spec give."
        )
    return spec_for_config(config, names)


def spec_for_config(config: Any, names: Collection[str] = ()) -> PermutationSpec:
    """[`spec_for`] of a configuration and the names of the model's tensors."""
    model_type = config.model_type
    if model_type in _UNSUPPORTED and model_type not in _BUILDERS:
        raise ValueError(f"Models of type '{model_type}' cannot be aligned: {_UNSUPPORTED[model_type]}.")
    if model_type not in _BUILDERS:
        raise KeyError(
            f"No permutation specification for model type '{model_type}'; {nearest(model_type, sorted(_BUILDERS))} "
            "Others are added by register_permutation_spec."
        )
    return _BUILDERS[model_type](config, names)
