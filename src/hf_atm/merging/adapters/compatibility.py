"""Whether adapters belong together: one base model, the same modules, the same shapes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from ..tensors import listed
from .modules import Layout
from .reading import Adapter


def check_compatible(adapters: Sequence[Adapter], strict: bool) -> dict[str, Layout]:
    """
    Checks that adapters can be merged.

    Args:
        adapters (`Sequence[Adapter]`): in canonical order.
        strict (`bool`): whether different base models and modules that some adapters lack are errors; otherwise they
            are warnings, and a module that an adapter lacks counts as a zero update of that adapter.

    Returns:
        `dict[str, Layout]`: all adapted modules, sorted.

    Raises:
        ValueError: naming modules and adapters and the way out.
    """
    layouts: dict[str, Layout] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            layout = layouts.setdefault(name, module.layout)
            if (layout.out, layout.inner, layout.embedding) != (
                module.layout.out,
                module.layout.inner,
                module.layout.embedding,
            ):
                first = next(other for other in adapters if name in other.modules)
                raise ValueError(
                    f"Module {name!r} is {layout.shape} in {first.label!r} but {module.layout.shape} in "
                    f"{adapter.label!r}; merge adapters of one base model."
                )
            # The flag is one for all modules of an adapter, so a mixed model may have lost it in some.
            layouts[name] = replace(layout, transposed=layout.transposed or module.layout.transposed)
    _check_bases(adapters, strict)
    _check_modules(adapters, layouts, strict)
    return {name: layouts[name] for name in sorted(layouts)}


def _check_bases(adapters: Sequence[Adapter], strict: bool) -> None:
    bases = {adapter.config.base_model_name_or_path: adapter.label for adapter in reversed(adapters)}
    named = sorted(base for base in bases if base)
    if len(named) > 1:
        shown = ", ".join(f"{base!r} ({bases[base]})" for base in named)
        text = f"The adapters name different base models, {shown}"
        if strict:
            raise ValueError(f"{text}; pass strict=False if these are copies of one model.")
        warnings.warn(f"{text}; they are taken for copies of one.", stacklevel=4)
    replicated = [adapter.config.layer_replication for adapter in adapters]
    if any(value != replicated[0] for value in replicated):
        raise ValueError(
            "The adapters have different layer_replication, hence different layers; they cannot be merged."
        )


def _check_modules(adapters: Sequence[Adapter], layouts: dict[str, Layout], strict: bool) -> None:
    for adapter in adapters:
        whole = sorted(key for key in adapter.saved if _owner(key) in layouts and ".base_layer." not in key)
        if whole:
            other = next(item for item in adapters if _owner(whole[0]) in item.modules)
            raise ValueError(
                f"{listed(whole)} is saved whole in {adapter.label!r} but adapted by LoRA in {other.label!r}; train it "
                "the same way in all adapters."
            )
    lacking = {adapter.label: sorted(set(layouts) - set(adapter.modules)) for adapter in adapters}
    lacking = {label: names for label, names in lacking.items() if names}
    if lacking:
        text = "; ".join(f"{label!r} does not adapt {listed(names)}" for label, names in lacking.items())
        if strict:
            raise ValueError(
                f"The adapters adapt different modules: {text}; pass strict=False to count a missing module as a zero "
                "update."
            )
        warnings.warn(f"Missing modules count as zero updates: {text}.", stacklevel=4)


def _owner(key: str) -> str:
    return key.rpartition(".")[0]
