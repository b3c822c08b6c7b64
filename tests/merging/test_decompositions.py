from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from hf_atm.merging import polar_factor
from hf_atm.merging.spectral import decompositions, lapack
from hf_atm.merging.spectral.decompositions import leading_eigh, reshape_spectrum, thin_svd

from . import reference
from .testing_utils import random_vectors


def random_matrix(shape, seed=0):
    return random_vectors(1, {"w": shape}, seed, torch.float64)[0]["w"]


def with_spectrum(values, shape, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, len(values))))[0] for size in shape)
    return left, right, torch.tensor(left * np.asarray(values) @ right.T)


@pytest.fixture(params=["scipy", "torch"])
def solver(request, monkeypatch):
    # Which of the two takes matrices of a size is a matter of the processor.
    monkeypatch.setattr(decompositions, "_LARGE", 1 if request.param == "scipy" else 1 << 30)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 4), (4, 1), (1, 1), (40, 33)])
def test_gram_equals_svd(shape, solver):
    matrix = random_matrix(shape)
    left, values, right = thin_svd(matrix)
    np.testing.assert_allclose(values.numpy(), np.linalg.svd(matrix.numpy())[1], rtol=1e-9)
    np.testing.assert_allclose(((left * values) @ right.T).numpy(), matrix.numpy(), atol=1e-9)
    np.testing.assert_allclose(polar_factor(matrix).numpy(), reference.polar(matrix.numpy()), atol=1e-9)


@pytest.mark.parametrize("count", [1, 4, 12, 40])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_leading_triplets_are_those_of_the_whole_svd(shape, count, solver):
    matrix = random_matrix(shape)
    left, values, right = thin_svd(matrix, count)
    expected_left, expected, expected_right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose(values.numpy(), expected[:count], rtol=1e-10)
    best = expected_left[:, :count] * expected[:count] @ expected_right[:count]
    np.testing.assert_allclose(((left * values) @ right.T).numpy(), best, atol=1e-9)
    np.testing.assert_allclose((left.T @ left).numpy(), np.eye(count), atol=1e-10)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_polar_of_ill_conditioned_matrices(condition):
    left, right, matrix = with_spectrum(np.geomspace(1, 1 / condition, 6), (20, 6))
    np.testing.assert_allclose(polar_factor(matrix).numpy(), left @ right.T, atol=1e-10)


def test_several_tiny_singular_values_stay_orthogonal():
    # A single Gram matrix would leave an error of 4e-7 here.
    left, right, matrix = with_spectrum([1, 1, 1, 3e-6, 2e-6, 2e-6], (8, 6))
    np.testing.assert_allclose(polar_factor(matrix).numpy(), left @ right.T, atol=1e-10)
    factors = thin_svd(matrix, max_rank=5)
    np.testing.assert_allclose(factors[1].numpy(), [1, 1, 1, 3e-6, 2e-6], rtol=1e-9)
    np.testing.assert_allclose((factors[0].T @ factors[0]).numpy(), np.eye(5), atol=1e-9)


def test_rank_deficient_matrices_give_partial_isometries():
    matrix = random_matrix((8, 2)) @ random_matrix((2, 6), seed=1)
    assert thin_svd(matrix)[1].numel() == 2
    assert thin_svd(matrix.float())[1].numel() == 2
    assert thin_svd(matrix.float(), max_rank=3)[1].numel() == 2
    np.testing.assert_allclose(np.linalg.svd(polar_factor(matrix).numpy())[1], [1, 1, 0, 0, 0, 0], atol=1e-9)
    assert torch.equal(polar_factor(torch.zeros(3, 2)), torch.zeros(3, 2, dtype=torch.float64))
    assert [part.shape for part in thin_svd(torch.zeros(3, 2))] == [(3, 0), (0,), (2, 0)]


def test_the_cutoff_decides_which_directions_count():
    left, right, matrix = with_spectrum([1, 0.1, 1e-6], (7, 5))
    for cutoff, rank in ((None, 3), (1e-5, 2), (1e-7, 3)):
        expected = left[:, :rank] @ right[:, :rank].T
        np.testing.assert_allclose(polar_factor(matrix, cutoff=cutoff).numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(np.linalg.svd(polar_factor(matrix, cutoff=0.0).numpy())[1], np.ones(5), atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_reshaped_spectra(shape):
    left, right, matrix = with_spectrum(np.geomspace(1, 1e-4, 20), shape)
    expected = left * (np.geomspace(1, 1e-4, 20) ** 0.3) @ right.T
    np.testing.assert_allclose(reshape_spectrum(matrix, lambda s: s**0.3).numpy(), expected, atol=1e-10)
    single = reshape_spectrum(matrix.float(), lambda s: s**0.3, torch.float32)
    assert single.dtype == torch.float32
    # The float32 entries themselves move the weakest of the directions by 1e-3.
    single = reshape_spectrum(matrix, lambda s: s**0.3, torch.float32)
    np.testing.assert_allclose(single.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, np.linalg.LinAlgError])
def test_svd_takes_over_when_the_eigenvalues_do_not_converge(monkeypatch, error):
    matrix = random_matrix((7, 4))
    expected, expected_values = polar_factor(matrix), thin_svd(matrix)[1]

    def fail(*_):
        raise error("no convergence")

    monkeypatch.setattr(decompositions, "leading_eigh", fail)
    torch.testing.assert_close(polar_factor(matrix), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(thin_svd(matrix)[1], expected_values)
    assert thin_svd(matrix, max_rank=2)[1].numel() == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 65])
def test_lapack_eigenvectors(size):
    assert lapack.is_available()
    matrix = random_matrix((size, size))
    symmetric = matrix + matrix.T
    for count in sorted({1, max(1, size // 8), size // 2 + 1, size} & set(range(1, size + 1))):
        values, vectors = leading_eigh(symmetric, count)
        np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(symmetric.numpy())[-count:], atol=1e-12)
        torch.testing.assert_close(symmetric @ vectors, vectors * values, atol=1e-12, rtol=0)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), atol=1e-12, rtol=0)


def test_lapack_says_when_it_fails(monkeypatch):
    with pytest.raises(np.linalg.LinAlgError, match="not finite"):
        lapack.leading_eigh(np.full((3, 3), np.nan), 2)

    def no_convergence(*arguments):
        ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_int))[0] = 5

    monkeypatch.setattr(lapack, "_routine", lambda name: no_convergence)
    with pytest.raises(np.linalg.LinAlgError, match="dsytrd.*5"):
        lapack.leading_eigh(np.eye(3), 2)


def test_unknown_declarations_are_not_called(monkeypatch):
    for cached in (lapack.is_available, lapack._routine):
        cached.cache_clear()
    monkeypatch.setitem(lapack._SIGNATURES, "dormtr", "ccciididdidid")
    try:
        assert not lapack.is_available()
        polar_factor(random_matrix((5, 4)))
    finally:
        for cached in (lapack.is_available, lapack._routine):
            cached.cache_clear()
