"""The register of merge methods: names, families, parameters and the checks made before any work starts."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor


FAMILIES = ("linear", "elementwise", "geometric", "spectral", "gram")

# Read by every entry point rather than by the methods themselves.
COMMON_PARAMETERS = ("scaling_coefficient", "scaling_factor")

MergeFunction = Callable[..., dict[str, Tensor]]
F = TypeVar("F", bound=MergeFunction)


@dataclass(frozen=True)
class MergeMethod:
    """One named merge rule.

    Args:
        name (`str`):
            Name users write in `merge_method`.
        function (`Callable`):
            `function(task_vectors, weights, names, **kwargs) -> dict[str, Tensor]`; pure, see
            [`register_merge_method`].
        family (`str`):
            `"linear"` (a weighted sum), `"elementwise"` (masks and signs), `"geometric"` (angles and norms),
            `"spectral"` (singular vectors of matrices) or `"gram"` (least squares over matrices).
        parameters (`Mapping[str, Any]`):
            Keyword parameters with their defaults. A parameter without default holds `inspect.Parameter.empty`.
        requires_base (`bool`):
            Whether the method needs task vectors, that is, a base model.
        per_tensor (`bool`):
            Whether each tensor is merged without looking at the others, given what `prepare` found, so that callers
            may hand over one tensor at a time.
        prepare (`Callable`, *optional*):
            `prepare(task_vectors, weights, names, **kwargs) -> Any`: what the method must know of the whole model, such
            as a threshold; `None` where these keywords need nothing. The function takes it as `context`.
        group (`Callable`, *optional*):
            `group(keys, **kwargs) -> list[list[str]]`: which of the sorted tensor names must be merged together.
        rescale (`Callable`, *optional*):
            `rescale(task_vector_norms, merged_norm) -> float`: a factor on the whole merged task vector that belongs to
            the method; callers apply it.
    """

    name: str
    function: MergeFunction
    family: str
    parameters: Mapping[str, Any]
    requires_base: bool = True
    per_tensor: bool = False
    prepare: Callable[..., Any] | None = None
    group: Callable[..., list[list[str]]] | None = None
    rescale: Callable[[Sequence[float], float], float] | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the parameters that have no default."""
        return tuple(name for name, default in self.parameters.items() if default is inspect.Parameter.empty)

    @property
    def accepts_any_keyword(self) -> bool:
        """Whether the function takes `**kwargs`, so that keyword names cannot be checked."""
        kinds = (parameter.kind for parameter in inspect.signature(self.function).parameters.values())
        return inspect.Parameter.VAR_KEYWORD in kinds

    def partition(self, keys: Sequence[str], kwargs: Mapping[str, Any]) -> list[list[str]]:
        """The tensor names, sorted and split into what may be merged one after the other, or at the same time."""
        keys = sorted(keys)
        if not self.per_tensor:
            return [keys]
        return [[key] for key in keys] if self.group is None else self.group(keys, **kwargs)

    def find_context(
        self,
        task_vectors: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        names: Sequence[str],
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The keyword with which the function knows of the whole model; empty where it needs nothing."""
        found = self.prepare(task_vectors, weights, names, **kwargs) if self.prepare is not None else None
        return {} if found is None else {"context": found}


_METHODS: dict[str, MergeMethod] = {}


def register_merge_method(
    name: str,
    *aliases: str,
    family: str,
    requires_base: bool = True,
    per_tensor: bool = False,
    prepare: Callable[..., Any] | None = None,
    group: Callable[..., list[list[str]]] | None = None,
    rescale: Callable[[Sequence[float], float], float] | None = None,
    overwrite: bool = False,
) -> Callable[[F], F]:
    """
    Decorator that makes a function available under `name` everywhere a merge method is chosen.

    Args:
        name (`str`):
            Name of the method.
        *aliases (`str`):
            Further names of the same method.
        family (`str`):
            `"linear"`, `"elementwise"`, `"geometric"`, `"spectral"` or `"gram"`.
        requires_base (`bool`, *optional*, defaults to `True`):
            Set to `False` if the function may also be given parameters instead of task vectors.
        per_tensor (`bool`, *optional*, defaults to `False`):
            Set to `True` if each tensor is merged on its own; checkpoints then never lie in memory as a whole.
        prepare, group, rescale (`Callable`, *optional*):
            What a method on single tensors needs of the whole model, see [`MergeMethod`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a registered name may be replaced.

    Returns:
        `Callable`: the decorator; it returns the function unchanged.

    Raises:
        `ValueError`: if a name is taken, the family is unknown, or the function lacks the three leading arguments.

    Example:

    ```python
    >>> from hf_atm.merging import register_merge_method

    >>> @register_merge_method("first", family="elementwise")
    ... def first(task_vectors, weights, names, *, sign=1.0):
    ...     return {key: sign * tensor.clone() for key, tensor in task_vectors[0].items()}
    ```
    """
    if family not in FAMILIES:
        raise ValueError(f"Merge method '{name}' has family {family!r}; the families are {', '.join(FAMILIES)}.")

    def decorator(function: F) -> F:
        arguments = list(inspect.signature(function).parameters.values())
        if len(arguments) < 3 or arguments[0].kind is inspect.Parameter.VAR_POSITIONAL:
            raise ValueError(f"Merge method '{name}' must take (task_vectors, weights, names, **kwargs).")
        skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        defaults = {
            argument.name: argument.default
            for argument in arguments[3:]
            if argument.kind not in skipped and argument.name != "context"
        }
        parameters = MappingProxyType(defaults)
        for label in (name, *aliases):
            if label in _METHODS and not overwrite:
                raise ValueError(f"Merge method '{label}' is already registered; pass overwrite=True to replace it.")
        for label in (name, *aliases):
            _METHODS[label] = MergeMethod(
                label, function, family, parameters, requires_base, per_tensor, prepare, group, rescale
            )
        return function

    return decorator


def get_merge_method(name: str) -> MergeMethod:
    """
    Looks a merge method up by name.

    Args:
        name (`str`):
            A name of [`list_merge_methods`].

    Returns:
        `MergeMethod`: the method.

    Raises:
        `KeyError`: if the name is unknown; the message lists the known ones.
    """
    if name not in _METHODS:
        known = list_merge_methods()
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'? Known methods are" if close else "known methods are"
        raise KeyError(f"Unknown merge method {name!r}; {hint} {', '.join(known)}.")
    return _METHODS[name]


def list_merge_methods() -> list[str]:
    """Returns the sorted names, aliases included, that `merge_method` accepts."""
    return sorted(_METHODS)


def check_merge_kwargs(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Checks the keywords of a merge method, so that a typing error ends before any long work.

    Args:
        name (`str`):
            Name of the method.
        kwargs (`Mapping[str, Any]`):
            The method's keywords. `scaling_coefficient` (or its alias `scaling_factor`), a finite number or `"norm"`,
            is accepted for every method.

    Returns:
        `dict[str, Any]`: the keywords, with `scaling_factor` renamed to `scaling_coefficient`. Defaults are not added.

    Raises:
        `KeyError`: if the method is unknown.
        `ValueError`: for an unknown or missing keyword, or a value outside its range: `density` in (0, 1], `gamma` in
            [0, 1), `gamma + density <= 1`, `epsilon < density <= 1 - epsilon`, `a` in [0, 1], `seed` an integer, and the listed words of the others.
    """
    method = get_merge_method(name)
    allowed = (*method.parameters, *COMMON_PARAMETERS)
    unknown = sorted(set(kwargs) - set(allowed))
    if unknown and not method.accepts_any_keyword:
        close = difflib.get_close_matches(unknown[0], allowed, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ValueError(
            f"Merge method '{name}' does not take {', '.join(map(repr, unknown))}{hint}; it takes {', '.join(allowed)}."
        )
    missing = [parameter for parameter in method.required if parameter not in kwargs]
    if missing:
        raise ValueError(f"Merge method '{name}' needs a value for {', '.join(missing)}.")
    for parameter, value in kwargs.items():
        if parameter in _RANGES:
            expected, accepts = _RANGES[parameter]
            if not accepts(value):
                raise ValueError(f"Merge method '{name}' got {parameter}={value!r}; expected {expected}.")
    values = {**method.parameters, **kwargs}
    if "gamma" in method.parameters and "density" in method.parameters:
        # The tolerance lets 0.007 + 0.993 pass, whose float sum may exceed one.
        if values["gamma"] + values["density"] > 1 + 1e-9:
            raise ValueError(
                f"Merge method '{name}' got gamma={values['gamma']} and density={values['density']}; "
                "their sum must not exceed 1."
            )
    if "epsilon" in method.parameters and "density" in method.parameters:
        if not (values["density"] > values["epsilon"] and values["density"] + values["epsilon"] <= 1 + 1e-9):
            raise ValueError(
                f"Merge method '{name}' got density={values['density']} and epsilon={values['epsilon']}; density - epsilon "
                "must exceed 0 and density + epsilon must not exceed 1."
            )
    if "scaling_factor" in kwargs and "scaling_coefficient" in kwargs:
        raise ValueError("Give either scaling_coefficient or its alias scaling_factor, not both.")
    return {"scaling_coefficient" if key == "scaling_factor" else key: value for key, value in kwargs.items()}


def _number(value: Any, accepts: Callable[[float], bool]) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and accepts(float(value))


def _integer(value: Any, minimum: float = -math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def _words(*words: str) -> tuple[str, Callable[[Any], bool]]:
    return "one of " + ", ".join(repr(word) for word in words), lambda value: value in words


def _is_scale(value: Any) -> bool:
    return value == "norm" if isinstance(value, str) else _number(value, math.isfinite)


def _is_thresholds(value: Any) -> bool:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return len(values) > 0 and all(_number(v, lambda x: 0 <= x < math.inf) for v in values)


def _is_patterns(value: Any) -> bool:
    # A lone string would be read letter by letter.
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)


_FLAG: tuple[str, Callable[[Any], bool]] = ("True or False", lambda value: isinstance(value, bool))
_SCALE: tuple[str, Callable[[Any], bool]] = ("a finite number or 'norm'", _is_scale)

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("a number in (0, 1], the fraction kept", lambda v: _number(v, lambda x: 0 < x <= 1)),
    "gamma": ("a number in [0, 1), the share of largest entries dropped", lambda v: _number(v, lambda x: 0 <= x < 1)),
    "epsilon": ("a number in [0, 0.5]", lambda v: _number(v, lambda x: 0 <= x <= 0.5)),
    "clip_tails": ("a number in [0, 0.5)", lambda v: _number(v, lambda x: 0 <= x < 0.5)),
    "mask_threshold": ("a number of at least 0, or a list of such numbers, one per task", _is_thresholds),
    "k": ("an integer of at least 1", lambda v: _integer(v, minimum=1)),
    "alpha": ("a number in [0, 1]", lambda v: _number(v, lambda x: 0 <= x <= 1)),
    "a": ("a number in [0, 1]", lambda v: _number(v, lambda x: 0 <= x <= 1)),
    "seed": ("an integer", _integer),
    "min_sparse_numel": ("an integer of at least 0", lambda v: _integer(v, minimum=0)),
    "trim_scope": _words("model", "tensor"),
    "majority_sign_method": _words("total", "frequency"),
    "merge_func": _words("mean", "sum", "max"),
    "rank_rule": _words("numerical", "full"),
    "common_space_fraction": ("a number in [0, 1]", lambda v: _number(v, lambda x: 0 <= x <= 1)),
    "fuse_qkv": ("True, False or None", lambda v: v is None or isinstance(v, bool)),
    "flatten_conv": _FLAG,
    "rank": ("an integer of at least 1, or None", lambda v: v is None or _integer(v, minimum=1)),
    "t": ("a number in [0, 1], 0 for the first model", lambda v: v is None or _number(v, lambda x: 0 <= x <= 1)),
    "max_iter": ("an integer of at least 1", lambda v: _integer(v, minimum=1)),
    "tol": ("a positive number", lambda v: _number(v, lambda x: 0 < x < math.inf)),
    "ridge": ("a number of at least 0", lambda v: _number(v, lambda x: 0 <= x < math.inf)),
    "flow_time": ("a positive number, infinity included", lambda v: _number(v, lambda x: x > 0)),
    "transposed": ("a list of name patterns, or None", lambda v: v is None or _is_patterns(v)),
    "non_matrix": ("a list of name patterns", _is_patterns),
    "normalize": _FLAG,
    "rescale": _FLAG,
    "weighted_vote": _FLAG,
    "scaling_coefficient": _SCALE,
    "scaling_factor": _SCALE,
}
