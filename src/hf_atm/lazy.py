"""Names of a package that are imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    The `__getattr__` and `__dir__` of a package.

    Args:
        namespace (`dict[str, Any]`): the package's `globals()`, which keeps what was imported.
        modules (`Mapping[str, str]`): by name, the submodule that holds it.

    Returns:
        `tuple[Callable, Callable]`: both functions.
    """
    package = namespace["__name__"]

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = getattr(import_module(f".{modules[name]}", package), name)
        return value

    return get, lambda: sorted({*namespace, *namespace["__all__"]})
