"""Small deterministic inputs for the merge tests."""

from __future__ import annotations

import torch


# One set of keywords with which every method runs; masks are on for the small tensors used here.
METHODS = {
    "mean": {},
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.3, "min_sparse_numel": 0},
    "dare": {"density": 0.5, "seed": 1, "min_sparse_numel": 0},
    "dare_linear": {"density": 0.5, "seed": 1, "min_sparse_numel": 0},
    "dare_ties": {"density": 0.5, "seed": 1, "min_sparse_numel": 0},
    "della": {"density": 0.5, "seed": 1, "min_sparse_numel": 0},
    "della_linear": {"density": 0.5, "seed": 1, "min_sparse_numel": 0},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1, "min_sparse_numel": 0},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1, "min_sparse_numel": 0},
    "consensus": {},
    "consensus_ta": {},
    "pcb": {"density": 0.3},
    "magmax": {},
    "tsv_m": {},
    "iso_c": {},
    "iso_cts": {},
    "model_stock": {},
    "wudi": {},
    "swudi": {},
}

# Methods that want two models, a sequence, parameters or measurements; their own files test what the others share.
SPECIAL_METHODS = ("adamerging", "fisher", "karcher", "opcm", "regmean", "slerp")

SHAPES = {
    "layer.weight": (12, 7),
    "layer.bias": (12,),
    "embed.weight": (9, 5),
    "conv.weight": (3, 2, 2, 2),
    "scale": (),
}


def random_vectors(count, shapes=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes
    return [
        {key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for key, shape in shapes.items()}
        for _ in range(count)
    ]


def as_numpy(vectors):
    return [{key: tensor.double().numpy() for key, tensor in vector.items()} for vector in vectors]


def assert_same(left, right):
    assert sorted(left) == sorted(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


def assert_near(merged, expected, tolerance):
    assert sorted(merged) == sorted(expected)
    for key, value in expected.items():
        torch.testing.assert_close(merged[key].double(), torch.as_tensor(value), rtol=tolerance, atol=tolerance)
