"""Post-processors: what is done to a merged task vector before it is scaled and added to the base; their register."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor


PostFunction = Callable[..., dict[str, Tensor]]
F = TypeVar("F", bound=PostFunction)
Ranges = Mapping[str, tuple[str, Callable[[Any], bool]]]

# How users write a post-processor: its name, or a mapping from its name to its keywords.
Spec = str | Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class PostProcessor:
    """One named post-processor.

    Args:
        name (`str`):
            Name users write in `postprocess`.
        function (`Callable`):
            `function(merged, task_vectors, weights, names, **kwargs) -> dict[str, Tensor]`; pure, one group of tensors
            at a time, see [`register_post_processor`].
        parameters (`Mapping[str, Any]`):
            Keyword parameters with their defaults. A parameter without default holds `inspect.Parameter.empty`.
        ranges (`Mapping[str, tuple[str, Callable]]`):
            For a parameter: what is expected, in words, and whether a value is that.
        prepare (`Callable`, *optional*):
            `prepare(keys, task_vectors, weights, names, method, **kwargs) -> Any`: what the function must know of the
            whole model and of the merge method. The function takes it as `context`.
    """

    name: str
    function: PostFunction
    parameters: Mapping[str, Any]
    ranges: Ranges
    prepare: Callable[..., Any] | None = None


_PROCESSORS: dict[str, PostProcessor] = {}


def register_post_processor(
    name: str,
    prepare: Callable[..., Any] | None = None,
    ranges: Ranges | None = None,
    overwrite: bool = False,
) -> Callable[[F], F]:
    """
    Decorator that makes a function available under `name` wherever `postprocess` is given.

    Args:
        name (`str`):
            Name of the post-processor.
        prepare (`Callable`, *optional*):
            What the function must know of the whole model, see [`PostProcessor`].
        ranges (`Mapping[str, tuple[str, Callable]]`, *optional*):
            For a parameter: what is expected, in words, and whether a value is that.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a registered name may be replaced.

    Returns:
        `Callable`: the decorator; it returns the function unchanged.

    Raises:
        `ValueError`: if the name is taken, or the function lacks the four leading arguments.

    Example:

    ```python
    >>> from hf_atm.merging import register_post_processor

    >>> @register_post_processor("shrink")
    ... def shrink(merged, task_vectors, weights, names, *, factor=0.5):
    ...     return {key: factor * tensor for key, tensor in merged.items()}
    ```
    """

    def decorator(function: F) -> F:
        arguments = list(inspect.signature(function).parameters.values())
        if len(arguments) < 4 or any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in arguments):
            raise ValueError(f"Post-processor '{name}' must take (merged, task_vectors, weights, names, **kwargs).")
        if name in _PROCESSORS and not overwrite:
            raise ValueError(f"Post-processor '{name}' is already registered; pass overwrite=True to replace it.")
        parameters = {
            argument.name: argument.default
            for argument in arguments[4:]
            if argument.kind is not inspect.Parameter.VAR_KEYWORD and argument.name != "context"
        }
        _PROCESSORS[name] = PostProcessor(name, function, MappingProxyType(parameters), dict(ranges or {}), prepare)
        return function

    return decorator


def list_post_processors() -> list[str]:
    """Returns the sorted names that `postprocess` accepts."""
    return sorted(_PROCESSORS)


def check_post_processors(specs: Sequence[Spec]) -> list[tuple[PostProcessor, dict[str, Any]]]:
    """
    Reads a `postprocess` list, so that a typing error ends before any long work.

    Args:
        specs (`Sequence[str | Mapping]`):
            Names, or mappings from one name to its keywords: `["svc", {"lines": {"alpha": 0.2, "beta": 0.8}}]`.

    Returns:
        `list[tuple[PostProcessor, dict]]`: the post-processors, in the order in which they apply, and their keywords.

    Raises:
        `KeyError`: for an unknown name; the message lists the known ones.
        `ValueError`: for anything that is neither, and for an unknown, missing or wrong keyword.
    """
    if isinstance(specs, str | Mapping):
        raise ValueError(f"postprocess must be a list; write [{specs!r}].")
    return [_read(spec) for spec in specs]


def prepare_post_processors(
    specs: Sequence[Spec],
    keys: Sequence[str],
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    method: str,
) -> list[Any]:
    """
    What the post-processors must know of the whole model, found once before any tensor is merged.

    Args:
        specs (`Sequence[str | Mapping]`):
            See [`check_post_processors`].
        keys (`Sequence[str]`):
            Names of all tensors that are merged.
        task_vectors, weights, names (`Sequence`):
            The T inputs of the merge.
        method (`str`):
            Name of the merge method.

    Returns:
        `list`: one item per post-processor, for [`apply_post_processors`].

    Raises:
        `KeyError` or `ValueError`: as [`check_post_processors`].
    """
    return [
        None if item.prepare is None else item.prepare(keys, task_vectors, weights, names, method, **kwargs)
        for item, kwargs in check_post_processors(specs)
    ]


def apply_post_processors(
    specs: Sequence[Spec],
    merged: Mapping[str, Tensor],
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    context: Sequence[Any],
) -> dict[str, Tensor]:
    """
    Applies post-processors, one after the other, to some tensors of a merged task vector.

    Args:
        specs (`Sequence[str | Mapping]`):
            See [`check_post_processors`].
        merged (`Mapping[str, Tensor]`):
            Merged task vector of these tensors, before any scale.
        task_vectors, weights, names (`Sequence`):
            The T inputs of the merge, with at least these tensors.
        context (`Sequence`):
            What [`prepare_post_processors`] found.

    Returns:
        `dict[str, Tensor]`: the same tensors, in the same types.
    """
    for (item, kwargs), found in zip(check_post_processors(specs), context, strict=True):
        known = {} if found is None else {"context": found}
        merged = item.function(merged, task_vectors, weights, names, **kwargs, **known)
    return dict(merged)


def is_finite(value: Any) -> bool:
    """Whether a keyword's value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _read(spec: Spec) -> tuple[PostProcessor, dict[str, Any]]:
    if isinstance(spec, str):
        spec = {spec: None}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(f"A post-processor is a name or a mapping from one name to its keywords; got {spec!r}.")
    ((name, given),) = spec.items()
    if name not in _PROCESSORS:
        known = ", ".join(list_post_processors())
        raise KeyError(f"Unknown post-processor {name!r}{_hint(name, _PROCESSORS)}; known ones are {known}.")
    item = _PROCESSORS[name]
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"The keywords of post-processor '{name}' must be a mapping, got {given!r}.")
    kwargs = dict(given or {})
    for parameter, value in kwargs.items():
        if parameter not in item.parameters:
            allowed = ", ".join(item.parameters) or "none"
            hint = _hint(parameter, item.parameters)
            raise ValueError(f"Post-processor '{name}' does not take '{parameter}'{hint}; its keywords: {allowed}.")
        expected, accepts = item.ranges.get(parameter, ("", lambda _: True))
        if not accepts(value):
            raise ValueError(f"Post-processor '{name}' got {parameter}={value!r}; expected {expected}.")
    required = [key for key, default in item.parameters.items() if default is inspect.Parameter.empty]
    missing = [key for key in required if key not in kwargs]
    if missing:
        raise ValueError(f"Post-processor '{name}' needs a value for {', '.join(missing)}.")
    return item, kwargs


def _hint(name: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
