"""Alignment: models from different initialisations in one frame, so that their weights can be merged."""

from __future__ import annotations

from . import families  # noqa: F401  (makes the families known)
from .barrier import loss_barrier
from .families.plain import mlp_spec, resnet_spec, vgg_spec
from .matching import align
from .merge import align_and_merge
from .permutation import Permutation
from .registry import register_permutation_spec, spec_for
from .repairing import repair
from .result import Alignment
from .spec import Flat, Heads, PermutationSpec
from .verify import check_permutation_spec


__all__ = [
    "Alignment",
    "Flat",
    "Heads",
    "Permutation",
    "PermutationSpec",
    "align",
    "align_and_merge",
    "check_permutation_spec",
    "loss_barrier",
    "mlp_spec",
    "register_permutation_spec",
    "repair",
    "resnet_spec",
    "spec_for",
    "vgg_spec",
]
