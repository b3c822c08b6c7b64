"""Merging PEFT adapters without their base model. Needs peft, and is therefore imported only when used."""

from __future__ import annotations

from .merge import merge_adapter_folders, merge_adapters
from .result import AdapterMerge


__all__ = ["AdapterMerge", "merge_adapter_folders", "merge_adapters"]
