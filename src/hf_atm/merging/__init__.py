"""Model merging: the in-loop merge of ATM and merges of finished models. Needs torch only."""

from __future__ import annotations

from .buffers import merge_buffers
from .linear import linear_coefficients, mean, task_arithmetic
from .registry import (
    MergeMethod,
    check_merge_kwargs,
    get_merge_method,
    list_merge_methods,
    register_merge_method,
)
from .sparse import breadcrumbs, dare, dare_ties
from .spectral import iso_c, polar_factor, tsv_m
from .state_dict import merge_state_dicts
from .task_vectors import merge_task_vectors, norm_scale
from .ties import ties


__all__ = [
    "MergeMethod",
    "breadcrumbs",
    "check_merge_kwargs",
    "dare",
    "dare_ties",
    "get_merge_method",
    "iso_c",
    "linear_coefficients",
    "list_merge_methods",
    "mean",
    "merge_buffers",
    "merge_state_dicts",
    "merge_task_vectors",
    "norm_scale",
    "polar_factor",
    "register_merge_method",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
