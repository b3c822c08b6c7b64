"""Where random walks return: what a node's surroundings look like beyond what messages can tell."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from .require import torch_geometric


if TYPE_CHECKING:
    from .graphs import Graphs


def return_probabilities(graphs: Graphs, walk_length: int) -> torch.Tensor:
    """
    Probability that a random walk from a node is back there after 1 to `walk_length` steps.

    Three steps tell triangles and five pentagons, which a network of messages alone does not see
    (https://huggingface.co/papers/2110.07875). torch_geometric's `AddRandomWalkPE`, graph by graph, so that a graph's
    values depend on it alone and memory on the largest.

    Args:
        graphs (`Mapping[str, torch.Tensor]`): Graphs side by side; `ptr`, `edge_ptr` and `edge_index` are read.
        walk_length (`int`): Steps, at least 1.

    Returns:
        `torch.Tensor`: fp32 `(nodes, walk_length)`, in [0, 1]; a node without edges has zeros.

    Raises:
        ImportError: Without torch_geometric.
    """
    torch_geometric()
    from torch_geometric.data import Data
    from torch_geometric.transforms import AddRandomWalkPE

    transform = AddRandomWalkPE(walk_length, attr_name="walks")
    ptr, edge_ptr = graphs["ptr"].tolist(), graphs["edge_ptr"].tolist()
    found = []
    with warnings.catch_warnings():
        # Large graphs go through PyTorch's sparse matrices.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        for row, (start, end) in enumerate(zip(ptr[:-1], ptr[1:], strict=True)):
            edges = graphs["edge_index"][:, edge_ptr[row] : edge_ptr[row + 1]] - start
            found.append(transform(Data(edge_index=edges, num_nodes=end - start)).walks)
    return torch.cat(found)
