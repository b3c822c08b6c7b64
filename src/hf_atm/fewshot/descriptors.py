"""Graphs as plain numbers: what can be told without learning anything."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sparse
from scipy.sparse.linalg import eigsh

from .graphs import GraphDataset
from .walks import return_probabilities


_DENSE = 512  # nodes up to which all eigenvalues are found at once


def node_statistics(
    dataset: GraphDataset, max_degree: int = 12, eigenvalues: int = 8, triangles: bool = True, walk_length: int = 0
) -> np.ndarray:
    """Size, degrees, spectrum, triangles and returning walks of every graph.

    Args:
        dataset ([`GraphDataset`]): Undirected graphs, each edge in both directions.
        max_degree (`int`, *optional*, defaults to 12): Larger degrees count as this one.
        eigenvalues (`int`, *optional*, defaults to 8): Kept of the adjacency and of the normalised Laplacian, the
            largest first; smaller graphs have zeros in place of those they lack. With 0, and without triangles, only
            sizes and degrees are left.
        triangles (`bool`, *optional*, defaults to `True`): Whether triangles are counted, and transitivity with them.
        walk_length (`int`, *optional*, defaults to 0): With at least 1, the sum over nodes of that many
            [`return_probabilities`] too; needs the extra `graphs`.

    Returns:
        `np.ndarray`: fp64 `(graphs, 4 + max_degree + 1 + 2 * eigenvalues + walk_length)`: nodes, edges, triangles,
        transitivity, share of nodes by degree, the eigenvalues and the walks; two columns fewer without triangles.
    """
    rows = range(len(dataset))
    found = np.stack([_statistics(_adjacency(dataset, row), max_degree, eigenvalues, triangles) for row in rows])
    if not walk_length:
        return found
    walks = return_probabilities(dataset.graphs, walk_length).double()
    sums = walks.new_zeros(len(dataset), walk_length).index_add_(0, dataset.graphs["batch"], walks)
    return np.concatenate([found, sums.numpy()], axis=1)


def _adjacency(dataset: GraphDataset, row: int) -> sparse.csr_matrix:
    graph = dataset.batch([row])
    size = len(graph["x"])
    source, target = graph["edge_index"].numpy()
    return sparse.csr_matrix((np.ones(len(source)), (target, source)), shape=(size, size))


def _statistics(adjacency: sparse.csr_matrix, max_degree: int, eigenvalues: int, triangles: bool) -> np.ndarray:
    size = adjacency.shape[0]
    degrees = np.asarray(adjacency.sum(1)).ravel()
    histogram = np.bincount(degrees.clip(max=max_degree).astype(int), minlength=max_degree + 1) / size
    closed = (adjacency @ adjacency).multiply(adjacency).sum() / 6
    paths = (degrees * (degrees - 1)).sum() / 2
    scale = sparse.diags(np.where(degrees > 0, degrees, 1) ** -0.5)
    laplacian = sparse.diags((degrees > 0).astype(float)) - scale @ adjacency @ scale
    return np.concatenate(
        [
            [size, adjacency.sum() / 2],
            [closed, 3 * closed / paths if paths else 0.0] if triangles else [],
            histogram,
            _largest(adjacency, eigenvalues),
            _largest(laplacian, eigenvalues),
        ]
    )


def _largest(matrix: sparse.csr_matrix, count: int) -> np.ndarray:
    size = matrix.shape[0]
    if not count:
        return np.empty(0)
    if size <= _DENSE:
        values = np.linalg.eigvalsh(matrix.toarray())[::-1][:count]
    else:
        # A fixed start: the default is random.
        values = np.sort(eigsh(matrix, k=count, which="LA", v0=np.ones(size), return_eigenvectors=False))[::-1]
    return np.pad(values, (0, count - len(values)))
