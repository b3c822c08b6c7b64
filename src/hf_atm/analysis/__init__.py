"""What happened to each task: diagnostics of task vectors, conditions of the theory, losses between models."""

from __future__ import annotations

from .conditions import gradient_identity, size_loss_covariance
from .diagnose import Diagnosis, LayerDiagnosis, diagnose
from .interference import effective_rank, singular_task_interference, subspace_alignment
from .landscape import Landscape, Plane, barrier_height, loss_landscape, loss_line
from .signs import SignCounts, count_signs


__all__ = [
    "Diagnosis",
    "Landscape",
    "LayerDiagnosis",
    "Plane",
    "SignCounts",
    "barrier_height",
    "count_signs",
    "diagnose",
    "effective_rank",
    "gradient_identity",
    "loss_landscape",
    "loss_line",
    "singular_task_interference",
    "size_loss_covariance",
    "subspace_alignment",
]
