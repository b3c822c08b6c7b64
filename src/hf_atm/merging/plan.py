"""Which tensors of several models are merged, pooled, copied or left out: decided from names, shapes and dtypes alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import Tensor

from .buffers import is_statistic
from .registry import MergeMethod
from .tensors import accumulation_dtype, listed
from .tying import tied_groups


State = Mapping[str, Tensor]

VOCAB_POLICIES = ("error", "common")
_VOCABULARY = ("*embed*", "*lm_head*", "*wte.*", "shared.weight", "*.shared.weight", "*predictions*")


# Integers under these names are weights of bitsandbytes, GPTQ or AWQ; others are positions, masks and counters.
QUANTISED = ("*.weight", "weight", "*qweight", "*qzeros")


@dataclass(frozen=True)
class MergePlan:
    """The fate of every tensor of a merge.

    Args:
        reference (`Mapping[str, Tensor]`): base, or first model; decides names, order and shapes of the result.
        groups (`dict[str, list[str]]`): merged tensors: name under which one is merged to all its tied names.
        pooled (`list[str]`): buffers that follow [`merge_buffers`].
        rows (`dict[str, int]`): leading rows to merge where vocabularies differ; the others come from the reference.
        dtypes (`dict[str, torch.dtype]`): type in which each merged tensor is computed.
        out_dtypes (`dict[str, torch.dtype]`): its type in the result.
        left_out (`list[str]`): tensors of the models that the result does not have.
    """

    reference: State
    groups: dict[str, list[str]]
    pooled: list[str]
    dtypes: dict[str, torch.dtype]
    out_dtypes: dict[str, torch.dtype]
    rows: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def leaders(self) -> list[str]:
        """Names under which tensors are merged, sorted."""
        return sorted(self.groups)

    @property
    def leader_of(self) -> dict[str, str]:
        """The name under which each merged tensor is merged."""
        return {key: leader for leader, members in self.groups.items() for key in members}


def plan_merge(
    models: Sequence[State],
    origin: State | None,
    *,
    exclude: Sequence[str] = (),
    strict: bool = True,
    buffers: str = "pooled",
    vocab_policy: str = "error",
    dtype: torch.dtype | None = None,
    tied: Mapping[str, str] | None = None,
    way_out: str = "name them in exclude, or pass strict=False to copy them from the base",
) -> MergePlan:
    """
    Decides what happens to every tensor.

    Args:
        models, origin (`Mapping[str, Tensor]`): T models and, if there is one, their base; only shapes, types and
            storage are looked at.
        exclude, strict, buffers, vocab_policy, dtype: as in [`merge_state_dicts`].
        tied (`Mapping[str, str]`, *optional*): names to merge as one with others, where storage does not show it.
        way_out (`str`, *optional*): what to advise where tensors do not match.

    Raises:
        `ValueError`: for keys, shapes or vocabularies that differ, complex or 8-bit tensors, or nothing to merge; the
            message lists the tensors and the ways out.
    """
    inputs = models if origin is None else [*models, origin]
    reference = models[0] if origin is None else origin
    shared, rows, left_out = _shared_keys(inputs, reference, exclude, strict, vocab_policy, way_out)
    merged, pooled = _split_keys(shared, inputs, reference, buffers)
    groups = tied_groups(inputs, merged)
    for copy, partner in (tied or {}).items():
        if copy in groups and partner in groups:
            members = sorted([*groups.pop(copy), *groups.pop(partner)])
            groups[members[0]] = members
    dtypes = {key: accumulation_dtype(widest(state[key] for state in inputs)) for key in groups}
    out_dtypes = {key: dtype or widest(state[key] for state in inputs) for key in groups}
    return MergePlan(reference, groups, pooled, dtypes, out_dtypes, rows, left_out)


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type that holds the values of all the tensors."""
    dtypes = [tensor.dtype for tensor in tensors]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor name matches one of the `fnmatch` patterns."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def with_tied_tables(rule: MergeMethod, kwargs: dict[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The keywords, with tables known as such under any of their tied names counted among the `non_matrix` ones."""
    if "non_matrix" not in rule.parameters:
        return kwargs
    patterns = kwargs.get("non_matrix", rule.parameters["non_matrix"])
    tables = [leader for leader in sorted(groups) if any(matches(key, patterns) for key in groups[leader])]
    return {**kwargs, "non_matrix": [*patterns, *map(escape, tables)]}


def _shared_keys(
    inputs: Sequence[State],
    reference: State,
    exclude: Sequence[str],
    strict: bool,
    vocab_policy: str,
    way_out: str,
) -> tuple[list[str], dict[str, int], list[str]]:
    """Keys that all inputs have in one shape, in the reference's order; rows where they differ; names left out."""
    everything = list(dict.fromkeys(key for state in (reference, *inputs) for key in state))
    left_out = [key for key in everything if matches(key, exclude) and key not in reference]
    everything = [key for key in everything if not matches(key, exclude)]
    shared: list[str] = []
    rows: dict[str, int] = {}
    problems: list[tuple[str, str]] = []
    vocabularies: list[str] = []
    shorter: list[str] = []
    for key in everything:
        entries = [state[key] for state in inputs if key in state]
        shapes = list(dict.fromkeys(tuple(entry.shape) for entry in entries if isinstance(entry, Tensor)))
        if len(entries) < len(inputs):
            problems.append((key, f"{key} (missing in {len(inputs) - len(entries)} of {len(inputs)} inputs)"))
        elif len(shapes) > 1:
            if _is_vocabulary(key, shapes):
                vocabularies.append(key)
                if vocab_policy == "common":
                    rows[key] = min(shape[0] for shape in shapes)
                    if key in reference and max(shape[0] for shape in shapes) > reference[key].shape[0]:
                        shorter.append(key)
                    shared.append(key)
                    continue
            problems.append((key, f"{key} ({' vs '.join(map(str, shapes))})"))
        elif shapes:
            shared.append(key)
    if problems and strict:
        hint = _special_way_out(inputs, reference, vocabularies) or way_out
        raise ValueError(
            f"These tensors do not match between the models: {listed([text for _, text in problems])}; {hint}."
        )
    if problems:
        copied = [key for key, _ in problems if key in reference]
        dropped = [key for key, _ in problems if key not in reference]
        left_out += dropped
        notes = [f"copied from the base (or first model): {listed(copied)}"] if copied else []
        notes += [f"left out: {listed(dropped)}"] if dropped else []
        warnings.warn(f"Tensors that do not match between the models were {'; '.join(notes)}.", stacklevel=4)
    if shorter:
        warnings.warn(
            f"The base (or first model) has fewer rows than others in {listed(shorter)}; their further rows were left out.",
            stacklevel=4,
        )
    if not shared:
        raise ValueError("There is nothing to merge: no tensor is in all models and outside exclude.")
    return shared, rows, left_out


def _is_vocabulary(key: str, shapes: Sequence[tuple[int, ...]]) -> bool:
    # Only rows differ, and there are many of them: a classifier's labels are not a vocabulary.
    return (
        matches(key, _VOCABULARY)
        and all(shapes)
        and len({shape[1:] for shape in shapes}) == 1
        and min(shape[0] for shape in shapes if shape) > max(abs(a[0] - b[0]) for a in shapes for b in shapes)
        and not matches(key, ("*position*", "*token_type*"))
    )


def _special_way_out(inputs: Sequence[State], reference: State, vocabularies: Sequence[str]) -> str:
    if vocabularies:
        sizes = " and ".join(str(size) for size in dict.fromkeys(state[vocabularies[0]].shape[0] for state in inputs))
        return (
            f"the vocabularies have {sizes} entries: resize them to one size, or pass vocab_policy='common' to merge "
            "the leading rows and take the others from the base (or first model)"
        )
    others = [state for state in inputs if state is not reference]
    prefix = _prefix(list(reference), list(others[0])) if others else ""
    if prefix:
        return (
            f"the names differ by the prefix {prefix!r}: the base was saved as a bare backbone, or the models were; "
            "save them from the same class"
        )
    return ""


def _prefix(left: Sequence[str], right: Sequence[str]) -> str:
    """A prefix such as `bert.` that turns most names of one side into names of the other."""
    for few, many in ((left, right), (right, left)):
        known = set(many)
        stems = sorted({key.split(".", 1)[0] + "." for key in many if "." in key})
        for stem in stems:
            hits = sum(stem + key in known and key not in known for key in few)
            if 2 * hits > len(few):
                return stem
    return ""


def _split_keys(
    shared: Sequence[str], inputs: Sequence[State], reference: State, buffers: str
) -> tuple[list[str], list[str]]:
    """Keys with arithmetic, and keys of buffers that follow [`merge_buffers`]."""
    merged, pooled = [], []
    for key in shared:
        tensor = reference[key]
        if tensor.is_complex():
            raise ValueError(f"Tensor '{key}' is complex, which no merge method supports; name it in exclude.")
        if any(state[key].is_floating_point() and state[key].dtype.itemsize < 2 for state in inputs):
            raise ValueError(
                f"Tensor '{key}' is quantised ({tensor.dtype}); dequantise the model before merging, or name it in "
                "exclude."
            )
        if is_statistic(key, reference):
            if buffers == "pooled":
                pooled.append(key)
        elif len({state[key].is_floating_point() for state in inputs}) > 1:
            raise ValueError(
                f"Tensor '{key}' is floating point in some models and not in others (quantised?); save all in one "
                "floating type, or name it in exclude."
            )
        elif tensor.is_floating_point():
            merged.append(key)
        elif tensor.dtype != torch.bool and matches(key, QUANTISED):
            raise ValueError(
                f"Tensor '{key}' holds weights as integers ({tensor.dtype}); dequantise the models before merging, or "
                "name it in exclude."
            )
        else:
            pooled.append(key)
    return merged, pooled
