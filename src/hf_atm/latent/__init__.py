"""Latent spaces: relative representations, and several models' spaces as one.

When weights cannot be merged, for models of different architectures or without access to them, representations can:
every space is expressed by cosines to the same samples, and averaged (RLSA,
https://huggingface.co/papers/2311.06547).
"""

from __future__ import annotations

from .aggregation import aggregate_latent_spaces
from .anchors import select_anchors
from .callback import LatentSpaceCallback
from .classifiers import centroid_accuracy, knn_accuracy, linear_probe
from .extraction import extract_embeddings
from .metrics import compare_spaces, linear_cka, separability, split_ids
from .relative import RelativeProjector
from .spaces import EmbeddingSet, LatentSpace


__all__ = [
    "EmbeddingSet",
    "LatentSpace",
    "LatentSpaceCallback",
    "RelativeProjector",
    "aggregate_latent_spaces",
    "centroid_accuracy",
    "compare_spaces",
    "extract_embeddings",
    "knn_accuracy",
    "linear_cka",
    "linear_probe",
    "select_anchors",
    "separability",
    "split_ids",
]
