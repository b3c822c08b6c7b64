"""Model merging: the in-loop merge of ATM and merges of finished models. Needs torch only, adapters peft as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .buffers import merge_buffers
from .data_driven.adaptive import LearnedCoefficients, adamerging, learn_coefficients
from .data_driven.fisher_statistics import collect_fisher
from .data_driven.gram_statistics import collect_gram
from .data_driven.measured import fisher, regmean
from .data_driven.recalibration import recalibrate_batch_norm
from .elementwise.breadcrumbs import breadcrumbs, breadcrumbs_ties
from .elementwise.consensus import TallMasks, consensus, tall_masks
from .elementwise.dare import dare, dare_ties
from .elementwise.della import della, della_linear
from .elementwise.magmax import magmax
from .elementwise.pcb import pcb
from .elementwise.ties import ties
from .gram import solve_gram, swudi, wudi
from .interpolation import karcher, model_stock, slerp
from .linear import linear_coefficients, mean, task_arithmetic
from .postprocess.lines import lines
from .postprocess.registry import check_post_processors, list_post_processors, register_post_processor
from .postprocess.svc import svc
from .registry import (
    MergeMethod,
    check_merge_kwargs,
    get_merge_method,
    list_merge_methods,
    register_merge_method,
)
from .spectral.compression import compress_task_vector, compression_error, decompress
from .spectral.decompositions import polar_factor
from .spectral.methods import iso_c, iso_cts, tsv_m
from .spectral.opcm import opcm
from .state_dict import merge_state_dicts
from .task_vectors import merge_task_vectors, norm_scale


if TYPE_CHECKING:
    from .adapters import AdapterMerge, merge_adapter_folders, merge_adapters
    from .checkpoints import CheckpointMerge, MergeRecipe, merge_checkpoints, read_recipe

__all__ = [
    "AdapterMerge",
    "CheckpointMerge",
    "LearnedCoefficients",
    "MergeMethod",
    "MergeRecipe",
    "TallMasks",
    "adamerging",
    "breadcrumbs",
    "breadcrumbs_ties",
    "check_merge_kwargs",
    "check_post_processors",
    "collect_fisher",
    "collect_gram",
    "compress_task_vector",
    "compression_error",
    "consensus",
    "dare",
    "dare_ties",
    "decompress",
    "della",
    "della_linear",
    "fisher",
    "get_merge_method",
    "iso_c",
    "iso_cts",
    "karcher",
    "learn_coefficients",
    "linear_coefficients",
    "lines",
    "list_merge_methods",
    "list_post_processors",
    "magmax",
    "mean",
    "merge_adapter_folders",
    "merge_adapters",
    "merge_buffers",
    "merge_checkpoints",
    "merge_state_dicts",
    "merge_task_vectors",
    "model_stock",
    "norm_scale",
    "opcm",
    "pcb",
    "polar_factor",
    "read_recipe",
    "recalibrate_batch_norm",
    "register_merge_method",
    "register_post_processor",
    "regmean",
    "slerp",
    "solve_gram",
    "svc",
    "swudi",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]

# Imported on first use: what needs peft, or the files' own packages.
_LAZY = {
    "AdapterMerge": "adapters",
    "CheckpointMerge": "checkpoints",
    "MergeRecipe": "checkpoints",
    "merge_adapter_folders": "adapters",
    "merge_adapters": "adapters",
    "merge_checkpoints": "checkpoints",
    "read_recipe": "checkpoints",
}


__getattr__, __dir__ = lazy_names(globals(), _LAZY)
