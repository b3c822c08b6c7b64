"""Model merging: the in-loop merge of ATM and merges of finished models. Needs torch only."""

from __future__ import annotations

from .breadcrumbs import breadcrumbs, breadcrumbs_ties
from .buffers import merge_buffers
from .consensus import TallMasks, consensus, tall_masks
from .dare import dare, dare_ties
from .della import della, della_linear
from .linear import linear_coefficients, mean, task_arithmetic
from .magmax import magmax
from .pcb import pcb
from .registry import (
    MergeMethod,
    check_merge_kwargs,
    get_merge_method,
    list_merge_methods,
    register_merge_method,
)
from .spectral import iso_c, polar_factor, tsv_m
from .state_dict import merge_state_dicts
from .task_vectors import merge_task_vectors, norm_scale
from .ties import ties


__all__ = [
    "MergeMethod",
    "TallMasks",
    "breadcrumbs",
    "breadcrumbs_ties",
    "check_merge_kwargs",
    "consensus",
    "dare",
    "dare_ties",
    "della",
    "della_linear",
    "get_merge_method",
    "iso_c",
    "linear_coefficients",
    "list_merge_methods",
    "magmax",
    "mean",
    "merge_buffers",
    "merge_state_dicts",
    "merge_task_vectors",
    "norm_scale",
    "pcb",
    "polar_factor",
    "register_merge_method",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
