"""
Symmetric eigenproblems on the CPU in pieces: only the vectors asked for, and without the interpreter lock.

torch and NumPy always compute all eigenvectors; SciPy can leave some out, but holds the interpreter lock meanwhile, so
that threads wait for each other. SciPy's LAPACK is therefore called through the function pointers that it documents for
this purpose (`scipy.linalg.cython_lapack`); ctypes releases the lock.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.linalg import LinAlgError
from numpy.typing import NDArray


# The pointers each routine takes, to (c)har, (i)nt or (d)ouble; with other integers SciPy would declare other types.
_SIGNATURES = {
    "dsytrd": "cididdddii",
    "dstedc": "cidddidiiii",
    "dstemr": "cciddddiiiddiiiidiiii",
    "dormtr": "ccciididdidii",
}

# Up to this share of the vectors, computing them one by one is faster than dividing and conquering all.
_SMALL_SHARE = 0.15

Array = NDArray[Any]


@cache
def is_available() -> bool:
    """Whether SciPy offers the four routines with the arguments expected here."""
    try:
        return all(_routine(name) is not None for name in _SIGNATURES)
    except (ImportError, AttributeError, KeyError):
        return False


def leading_eigh(matrix: Array, count: int) -> tuple[Array, Array]:
    """
    The largest eigenvalues of a symmetric matrix with their eigenvectors.

    Householder reduction to tridiagonal form, then divide and conquer, or for few vectors relatively robust
    representations, and the way back for the vectors asked for alone.

    Args:
        matrix (`ndarray`):
            Shape `(n, n)`, float64, symmetric, n at least 1.
        count (`int`):
            Number of eigenvalues, from 1 to n.

    Returns:
        `tuple[ndarray, ndarray]`: eigenvalues `(count,)`, ascending, and orthonormal vectors `(n, count)`.

    Raises:
        `LinAlgError`: if the matrix has entries that are not finite, or LAPACK does not converge.
    """
    size = len(matrix)
    # Rows a power of two apart fall on the same cache lines, which doubles the time of the way back.
    stride = 8 * (-(-size // 8) | 1)
    reflectors = np.empty((size, stride))
    reflectors[:, :size] = matrix
    diagonal, beside, scales = np.empty(size), np.empty(size), np.empty(size)
    work = np.empty(64 * size)
    _call("dsytrd", "L", size, reflectors, stride, diagonal, beside, scales, work, work.size)
    if not (np.isfinite(diagonal).all() and np.isfinite(beside[:-1]).all()):
        raise LinAlgError("The matrix has entries that are not finite.")
    solve = _some_tridiagonal if count <= _SMALL_SHARE * size else _all_tridiagonal
    values, vectors = solve(diagonal, beside, stride, count)
    _call("dormtr", "L", "L", "N", size, count, reflectors, stride, scales, vectors, stride, work, work.size)
    return values, vectors[:, :size].T


def _all_tridiagonal(diagonal: Array, beside: Array, stride: int, count: int) -> tuple[Array, Array]:
    size = len(diagonal)
    vectors = np.empty((size, stride))
    work, integers = np.empty(1 + 4 * size + size * size), np.empty(3 + 5 * size, dtype=np.intc)
    _call("dstedc", "I", size, diagonal, beside, vectors, stride, work, work.size, integers, integers.size)
    return diagonal[size - count :], vectors[size - count :]


def _some_tridiagonal(diagonal: Array, beside: Array, stride: int, count: int) -> tuple[Array, Array]:
    size = len(diagonal)
    values, vectors = np.empty(size), np.empty((count, stride))
    found, support, accurate = np.zeros(1, np.intc), np.empty(2 * count, np.intc), np.ones(1, np.intc)
    work, integers = np.empty(18 * size), np.empty(10 * size, dtype=np.intc)
    unused = np.zeros(1)
    _call(
        *("dstemr", "V", "I", size, diagonal, beside, unused, unused, size - count + 1, size, found, values, vectors),
        *(stride, count, support, accurate, work, work.size, integers, integers.size),
    )
    if found[0] != count:
        raise LinAlgError(f"LAPACK found {found[0]} of {count} eigenvectors.")
    return values[:count], vectors


def _call(name: str, *arguments: str | int | Array) -> None:
    """Calls a routine as Fortran does, by reference, and checks the status that is its last argument."""
    status = ctypes.c_int(0)
    held: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            held.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, int):
            held.append(ctypes.byref(ctypes.c_int(argument)))
        else:
            held.append(ctypes.c_char_p(argument.encode()))
    _routine(name)(*held, ctypes.byref(status))
    if status.value != 0:
        raise LinAlgError(f"LAPACK's {name} ended with status {status.value}.")


@cache
def _routine(name: str) -> Callable[..., None]:
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    declaration = name_of(capsule)
    kinds = re.findall(r"(\bchar|\bint|_d) \*", declaration.decode())
    if "".join(kind[-1] if kind == "_d" else kind[0] for kind in kinds) != _SIGNATURES[name]:
        raise AttributeError(f"SciPy declares {name} as {declaration!r}, which is not known here.")
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(kinds))(pointer_of(capsule, declaration))
