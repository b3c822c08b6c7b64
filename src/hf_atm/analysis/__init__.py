"""What happened to each task: diagnostics of task vectors, conditions of the theory, losses between models."""

from .diagnose import Diagnosis, LayerDiagnosis, diagnose
from .interference import effective_rank, singular_task_interference, subspace_alignment
from .signs import SignCounts, count_signs


__all__ = [
    "Diagnosis",
    "LayerDiagnosis",
    "SignCounts",
    "count_signs",
    "diagnose",
    "effective_rank",
    "singular_task_interference",
    "subspace_alignment",
]
