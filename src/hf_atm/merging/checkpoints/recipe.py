"""Merge recipes: YAML or JSON with the keys that mergekit's users know, checked before anything is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ..plan import VOCAB_POLICIES
from ..postprocess.registry import check_post_processors
from ..registry import check_merge_kwargs, get_merge_method
from ..tensors import FLOATING, check_names, check_weights, nearest
from .alignment import check_alignable, parse_align


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
_MODEL_KEYS = ("model", "name", "revision", "parameters", "statistics")
_MODEL_PARAMETERS = ("weight", "density")
_ELSEWHERE = {
    "slices": "layers cannot be restacked; list whole models under 'models'",
    "modules": "list whole models under 'models'",
    "tokenizer": "write tokenizer_source: base, or the name of a model",
    "chat_template": "the chat template comes with tokenizer_source",
    "parallel": "start the command with accelerate launch --num_processes N",
}
# Methods whose divisor mergekit's `normalize` switches on and off, where it is called merge_func here.
_ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")


@dataclass(frozen=True)
class RecipeModel:
    """One input of a recipe.

    Args:
        model (`str`): a folder, a `.safetensors` file, a PEFT adapter's folder, or a Hub id.
        name (`str`): distinct; decides random masks and the order of summation.
        weight (`float`): its weight.
        revision (`str`, *optional*): on the Hub.
        statistics (`str`, *optional*): a safetensors file of statistics, for methods that need them.
    """

    model: str
    name: str
    weight: float = 1.0
    revision: str | None = None
    statistics: str | None = None


@dataclass(frozen=True)
class MergeRecipe:
    """A whole merge of checkpoints or adapters, as a YAML recipe describes it.

    Args:
        models (`list[RecipeModel]`): what is merged.
        merge_method (`str`): a name of [`list_merge_methods`].
        base_model (`str`, *optional*): origin of the task vectors; names, shapes and side files of the result.
        parameters (`dict`): keywords of the method, and `scaling_coefficient`.
        out_dtype (`str`, *optional*): type of the result; by default each tensor keeps the widest of its inputs. Merges
            are computed in float32 or better whatever is asked for.
        exclude (`list[str]`): patterns of tensors taken from the base.
        task_specific_modules (`list[str]`): patterns of tensors kept per model beside the merged weights.
        strict, buffers, vocab_policy: as in [`merge_state_dicts`].
        postprocess (`list`): post-processors of the merged task vector.
        tokenizer_source (`str`): `"base"`, or the name of a model, whose tokenizer files the result gets.
        copy_code (`bool`): whether Python files of the base are copied.
        align (`str` or `dict`): for models from different starts, how their units are brought into one order before the
            merge: a method, or `{method: c2m3, starts: [...], max_iter, tol, polish, heads: [...], seed}` as in
            [`~hf_atm.alignment.align`]. The base is aligned with the models, and the result lies in its frame, or
            without one in that of the first model.
        adapters (`dict`): where the models are PEFT adapters, keywords of [`merge_adapters`] such as `output`.
        base_revision (`str`, *optional*): of the base on the Hub.
    """

    models: list[RecipeModel]
    merge_method: str = "mean"
    base_model: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    out_dtype: str | None = None
    exclude: list[str] = field(default_factory=list)
    task_specific_modules: list[str] = field(default_factory=list)
    strict: bool = True
    buffers: str = "pooled"
    vocab_policy: str = "error"
    postprocess: list[Any] = field(default_factory=list)
    tokenizer_source: str = "base"
    copy_code: bool = False
    align: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    base_revision: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's content."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()


def read_recipe(source: str | os.PathLike | Mapping[str, Any] | MergeRecipe) -> MergeRecipe:
    """
    Reads and checks a recipe.

    Args:
        source (`str`, `PathLike`, mapping or [`MergeRecipe`]): a YAML or JSON file, or its content. Relative paths in a
            file are looked up from where the command runs, then from the file's folder.

    Returns:
        [`MergeRecipe`]

    Raises:
        `FileNotFoundError`: if there is no such file.
        `KeyError`: for an unknown method.
        `ValueError`: for unknown keys (with the nearest known one), values out of range, or what mergekit can do and
            this library cannot, with the way out.
    """
    if isinstance(source, MergeRecipe):
        source = _content(source)
    folder = None
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"Recipe {str(source)!r} does not exist.")
        source, folder = _load(path), path.parent
    return _parse(source, folder)


def with_dtype(recipe: MergeRecipe, out_dtype: str | torch.dtype) -> MergeRecipe:
    """
    The recipe with another type of the result.

    Raises:
        `ValueError`: for a type that weights are not written in.
    """
    name = str(out_dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"out_dtype={name!r} is unknown; choose one of {', '.join(DTYPES)}.")
    return replace(recipe, out_dtype=name)


def with_align(recipe: MergeRecipe, align: str | Mapping[str, Any]) -> MergeRecipe:
    """
    The recipe with another key `align`.

    Raises:
        `ValueError`: for one that does not fit the recipe.
    """
    settings = parse_align(align)
    if settings:
        check_alignable(get_merge_method(recipe.merge_method), recipe.base_model is not None)
    return replace(recipe, align=settings)


def _load(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"Recipe {str(path)!r} must be a mapping with the keys merge_method and models.")
    return content


def _parse(content: Mapping[str, Any], folder: Path | None) -> MergeRecipe:
    fields = [name for name in MergeRecipe.__dataclass_fields__]
    for key in content:
        if key in _ELSEWHERE:
            raise ValueError(f"Recipe key '{key}' is not supported: {_ELSEWHERE[key]}.")
        if key not in (*fields, "dtype"):
            raise ValueError(f"Recipe has an unknown key '{key}'; {nearest(str(key), [*fields, 'dtype'])}")
    values = {key: value for key, value in content.items() if key != "dtype" and value is not None}
    method = values.get("merge_method", "mean")
    for label in ("merge_method", "base_model", "base_revision", "tokenizer_source"):
        if not isinstance(values.get(label, ""), str):
            raise ValueError(f"Recipe key '{label}' must be a text, got {values[label]!r}.")
    rule = get_merge_method(method)
    models, base, densities = _models(content.get("models"), values.get("base_model"), rule.requires_base, folder)
    for label in ("exclude", "task_specific_modules", "postprocess"):
        if label in values and (isinstance(values[label], str) or not isinstance(values[label], Sequence)):
            raise ValueError(f"Recipe key '{label}' must be a list; write {label}: [{values[label]!r}].")
    for label in ("exclude", "task_specific_modules"):
        wrong = [pattern for pattern in values.get(label, ()) if not isinstance(pattern, str)]
        if wrong:
            raise ValueError(f"Recipe key '{label}' must list name patterns, and {wrong[0]!r} is none.")
    if not isinstance(values.get("adapters", {}), Mapping):
        raise ValueError(
            f"Recipe key 'adapters' must be a mapping such as {{output: svd}}, got {values['adapters']!r}."
        )
    check_post_processors(values.get("postprocess", ()))
    for label in ("strict", "copy_code"):
        if not isinstance(values.get(label, True), bool):
            raise ValueError(f"Recipe key '{label}' must be true or false, got {values[label]!r}.")
    _choice(values, "buffers", ("pooled", "base"))
    _choice(values, "vocab_policy", VOCAB_POLICIES)
    values["out_dtype"] = _dtype(content)
    if method == "slerp" and base is not None and any(_same_place(model.model, base) for model in models):
        # Where the base is one of the two ends, it is the one at t = 0.
        start = base
        models, base = sorted(models, key=lambda model: not _same_place(model.model, start)), None
    values["parameters"] = _parameters(method, values.get("parameters"), densities, models, folder)
    source = values.get("tokenizer_source", "base")
    if source != "base" and source not in [model.name for model in models]:
        values["tokenizer_source"] = source = _located(source, folder)
    if source not in ("base", *(model.name for model in models), *(model.model for model in models)):
        raise ValueError(
            f"tokenizer_source={source!r} is neither 'base' nor one of the models "
            f"({', '.join(model.name for model in models)}); vocabularies cannot be united."
        )
    recipe = MergeRecipe(**{**values, "align": {}, "models": models, "base_model": base})
    return with_align(recipe, values["align"]) if "align" in values else recipe


def _models(
    entries: Any, base: str | None, requires_base: bool, folder: Path | None
) -> tuple[list[RecipeModel], str | None, list[float]]:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ValueError(
            "Recipe key 'models' must be a list of entries such as {model: ./sst2, parameters: {weight: 1}}."
        )
    base = _located(base, folder) if base is not None else None
    found, densities = [], []
    for entry in entries:
        entry = {"model": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise ValueError(f"Each entry of 'models' needs a model, such as {{model: ./sst2}}; got {entry!r}.")
        for key in entry:
            if key not in _MODEL_KEYS:
                raise ValueError(
                    f"Model {entry['model']!r} has an unknown key '{key}'; {nearest(str(key), _MODEL_KEYS)}"
                )
        parameters = entry.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ValueError(f"Model {entry['model']!r} has parameters={parameters!r}; write {{weight: 1}}.")
        for key, value in parameters.items():
            if key not in _MODEL_PARAMETERS:
                raise ValueError(
                    f"Model {entry['model']!r} has an unknown parameter '{key}'; {nearest(str(key), _MODEL_PARAMETERS)}"
                )
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(
                    f"Model {entry['model']!r} has {key}={value!r}; give one finite number (gradients over layers and "
                    "filters are not supported)."
                )
        location = _located(entry["model"], folder)
        if requires_base and base is not None and not parameters and _same_place(location, base):
            # Recipes often list the base among the models; its task vector is zero.
            continue
        densities += [float(parameters["density"])] if "density" in parameters else []
        weight = float(parameters.get("weight", 1.0))
        found.append((location, weight, entry))
    if not found:
        raise ValueError("Recipe key 'models' lists nothing but the base model; add the models to merge.")
    names = _names([(location, entry.get("name")) for location, _, entry in found])
    models = [
        RecipeModel(location, name, weight, entry.get("revision"), _statistics(entry, folder))
        for (location, weight, entry), name in zip(found, names, strict=True)
    ]
    check_weights([model.weight for model in models], len(models))
    return models, base, densities


def _names(entries: Sequence[tuple[str, str | None]]) -> list[str]:
    """Given names; else the last part of a path, so that masks do not depend on where a folder lies."""
    short = [name or (model if not Path(model).exists() else Path(model).resolve().name) for model, name in entries]
    if all(name is None for _, name in entries) and len(set(short)) < len(short):
        short = [model for model, _ in entries]
    return check_names(short, len(short))


def _located(model: str, folder: Path | None) -> str:
    if folder is not None and not Path(model).expanduser().exists() and (folder / model).exists():
        return str(folder / model)
    return model


def _same_place(left: str, right: str) -> bool:
    """Whether two references name one folder or Hub id, however they are written."""
    paths = [Path(place).expanduser() for place in (left, right)]
    return left == right or (all(path.exists() for path in paths) and os.path.samefile(*paths))


def _content(recipe: MergeRecipe) -> dict[str, Any]:
    """A recipe made in Python as the mapping it could have been read from, so that it is checked like one."""
    content = asdict(recipe)
    for model in content["models"]:
        model["parameters"] = {"weight": model.pop("weight")}
    # Post-processors may be callables, which must stay themselves.
    content["postprocess"] = recipe.postprocess
    content["parameters"] = dict(recipe.parameters)
    return content


def _statistics(entry: Mapping[str, Any], folder: Path | None) -> str | None:
    if entry.get("statistics") is None:
        return None
    path = _located(str(entry["statistics"]), folder)
    if not Path(path).is_file():
        raise FileNotFoundError(f"Model {entry['model']!r} has statistics {path!r}, and there is no such file.")
    return path


def _dtype(content: Mapping[str, Any]) -> str | None:
    # `dtype` is the working type of other tools and, unless out_dtype is there, the type they write.
    for key in ("out_dtype", "dtype"):
        if content.get(key) is not None and content[key] not in DTYPES:
            raise ValueError(f"Recipe has {key}={content[key]!r}; expected one of {', '.join(DTYPES)}.")
    return content.get("out_dtype") or content.get("dtype")


def _choice(values: Mapping[str, Any], key: str, choices: Sequence[str]) -> None:
    if key in values and values[key] not in choices:
        raise ValueError(f"Recipe has {key}={values[key]!r}; expected one of {', '.join(choices)}.")


def _parameters(
    method: str, given: Any, densities: Sequence[float], models: Sequence[RecipeModel], folder: Path | None
) -> dict[str, Any]:
    """The method's keywords under our names."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"Recipe key 'parameters' must be a mapping such as {{density: 0.2}}, got {given!r}.")
    parameters = dict(given or {})
    parameters.pop("int8_mask", None)
    _rename(parameters, "lambda", "scaling_coefficient")
    if len(set(densities)) > 1:
        raise ValueError(f"The models have different densities {list(densities)}; give one under 'parameters'.")
    if 0 < len(densities) < len(models):
        raise ValueError(f"Some models have the density {densities[0]} and others none; give it under 'parameters'.")
    if densities:
        if parameters.setdefault("density", densities[0]) != densities[0]:
            raise ValueError(
                f"Recipe key 'parameters' has density={parameters['density']!r} and the models have {densities[0]}; give "
                "one of them."
            )
    if isinstance(parameters.get("coefficients"), str):
        parameters["coefficients"] = _read_coefficients(_located(parameters["coefficients"], folder))
    if method in _ELECTING and "normalize" in parameters:
        _rename(parameters, "normalize", "merge_func")
        parameters["merge_func"] = "mean" if parameters["merge_func"] else "sum"
    if "statistics" not in get_merge_method(method).parameters:
        return check_merge_kwargs(method, parameters)
    for model in models:
        if model.statistics is None:
            raise ValueError(
                f"Merge method '{method}' needs a file of statistics for model {model.model!r}; add statistics: "
                "FILE.safetensors to its entry."
            )
    checked = check_merge_kwargs(method, {**parameters, "statistics": [model.statistics for model in models]})
    return {key: value for key, value in checked.items() if key != "statistics"}


def _rename(parameters: dict[str, Any], foreign: str, own: str) -> None:
    """Puts another tool's parameter under our name."""
    if foreign in parameters:
        if own in parameters:
            raise ValueError(f"Recipe key 'parameters' has both '{foreign}' and '{own}'; give one of them.")
        parameters[own] = parameters.pop(foreign)


def _read_coefficients(path: str) -> Any:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"coefficients={path!r} is no readable JSON file ({error}).") from error
    # What learn_coefficients returned may be saved whole.
    return content.get("coefficients", content) if isinstance(content, Mapping) else content
