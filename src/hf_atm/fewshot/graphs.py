"""Graphs as one block of memory, from which batches of any graphs are cut without touching them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .walks import return_probabilities


#: Graphs side by side, as torch_geometric's `Batch` has them: `x` `(nodes, features)`, `edge_index` `(2, edges)`,
#: `batch` `(nodes,)`, `ptr` `(graphs + 1,)`, and `edge_ptr` `(graphs + 1,)`, where each graph's edges begin.
Graphs = Mapping[str, torch.Tensor]

FEATURES = ("attributes", "degree", "log_degree")


def select_graphs(graphs: Graphs, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The graphs of the given rows, in their order; rows may repeat.

    Args:
        graphs (`Mapping[str, torch.Tensor]`): Graphs side by side.
        rows (`torch.Tensor`): int64 `(n,)`, on the same device.
    """
    nodes, owner, ptr = _ranges(graphs["ptr"], rows)
    edges, edge_owner, edge_ptr = _ranges(graphs["edge_ptr"], rows)
    shift = ptr[:-1] - graphs["ptr"][rows]
    return {
        "x": graphs["x"].index_select(0, nodes),
        "edge_index": graphs["edge_index"].index_select(1, edges) + shift[edge_owner],
        "batch": owner,
        "ptr": ptr,
        "edge_ptr": edge_ptr,
    }


def _ranges(ptr: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Members of the chosen ranges, which range each is from, and where the ranges begin once side by side."""
    start = ptr[rows]
    sizes = ptr[rows + 1] - start
    begin = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    owner = torch.repeat_interleave(torch.arange(len(rows), device=ptr.device), sizes)
    return torch.arange(len(owner), device=ptr.device) + (start - begin[:-1])[owner], owner, begin


@dataclass(frozen=True)
class NodeFeatures:
    """What a node is described by; made once, on the training graphs, and used for all.

    Args:
        kind (`str`): `"attributes"` (the column `x`), `"degree"` (one-hot, capped at the training maximum) or
            `"log_degree"` (one-hot of the binary logarithm, likewise).
        size (`int`): Features per node, those of walks among them.
        walk_length (`int`, *optional*, defaults to 0): With at least 1, that many [`return_probabilities`] beside
            them.
    """

    kind: str
    size: int
    walk_length: int = 0

    @classmethod
    def fit(cls, kind: str, degrees: np.ndarray, attributes: np.ndarray | None, walk_length: int = 0) -> NodeFeatures:
        """The features of training graphs; `"auto"` takes attributes where there are some, else degrees.

        Raises:
            ValueError: If the kind is unknown, attributes are asked for and there are none, or `walk_length` is no
                number of steps.
        """
        if not isinstance(walk_length, int) or walk_length < 0:
            raise ValueError(f"walk_length is {walk_length!r}; it must be a whole number, at least 0.")
        if kind == "auto":
            many = len(degrees) and degrees.max() > 100
            kind = "attributes" if attributes is not None else "log_degree" if many else "degree"
        if kind not in FEATURES:
            raise ValueError(f"features is {kind!r}; known: auto, {', '.join(FEATURES)}.")
        if kind == "attributes":
            if attributes is None:
                raise ValueError("features='attributes' need a column x, and these graphs have none; use 'degree'.")
            return cls(kind, attributes.shape[1] + walk_length, walk_length)
        return cls(kind, int(_bins(kind, degrees).max()) + 1 + walk_length, walk_length)

    def __call__(self, graphs: Graphs, degrees: np.ndarray, attributes: np.ndarray | None) -> torch.Tensor:
        """Features of nodes, fp32 `(nodes, size)`."""
        own = self._own(self.size - self.walk_length, degrees, attributes)
        return torch.cat([own, return_probabilities(graphs, self.walk_length)], 1) if self.walk_length else own

    def _own(self, size: int, degrees: np.ndarray, attributes: np.ndarray | None) -> torch.Tensor:
        if self.kind == "attributes":
            width = 0 if attributes is None else attributes.shape[1]
            if attributes is None or width != size:
                raise ValueError(f"these graphs have {width} features per node, and the training graphs {size}.")
            return torch.from_numpy(attributes.astype(np.float32))
        return torch.from_numpy(np.eye(size, dtype=np.float32)[_bins(self.kind, degrees).clip(max=size - 1)])


def _bins(kind: str, degrees: np.ndarray) -> np.ndarray:
    return np.log2(degrees + 1).astype(np.int64) if kind == "log_degree" else degrees


class GraphDataset(Dataset):
    """A data set of graphs; collates itself.

    Args:
        num_nodes (`Sequence[int]`): Nodes of each graph; isolated ones count, so they are never inferred from edges.
        edges (`Sequence[np.ndarray]`): Each graph's edges, `(2, edges)`, sources and targets, both directions of an
            undirected edge.
        labels (`Sequence[int]`): Class of each graph.
        attributes (`Sequence[np.ndarray]`, *optional*): Each graph's node features, `(nodes, features)`.
        features (`str` or [`NodeFeatures`], *optional*, defaults to `"auto"`): What a node is described by, see
            [`NodeFeatures`]; pass the training set's `features` to the other sets.
        walk_length (`int`, *optional*, defaults to 0): With at least 1, each node also has the probabilities that a
            random walk returns to it within so many steps, which tell triangles and other cycles; see
            [`return_probabilities`]. Needs the extra `graphs`. [`NodeFeatures`] bring their own.
        label_names (`Sequence[str]`, *optional*): Names of all classes, by label.

    Raises:
        ValueError: For an empty graph, an edge to a node that does not exist, missing features, or differing widths.
    """

    def __init__(
        self,
        num_nodes: Sequence[int],
        edges: Sequence[np.ndarray],
        labels: Sequence[int],
        attributes: Sequence[np.ndarray] | None = None,
        features: str | NodeFeatures = "auto",
        label_names: Sequence[str] | None = None,
        walk_length: int = 0,
    ) -> None:
        sizes = np.asarray(num_nodes, dtype=np.int64)
        if not len(sizes) == len(edges) == len(labels):
            raise ValueError(f"there are {len(sizes)} graphs, {len(edges)} lists of edges and {len(labels)} labels.")
        if len(sizes) == 0:
            raise ValueError("there is no graph; give at least one.")
        if (sizes < 1).any():
            raise ValueError(f"graph {int((sizes < 1).argmax())} has no nodes; leave it out.")
        arrays = [_edges(row, edge) for row, edge in enumerate(edges)]
        for row, (edge, size) in enumerate(zip(arrays, sizes, strict=True)):
            if edge.size and not 0 <= edge.min() <= edge.max() < size:
                wrong = edge.max() if edge.max() >= size else edge.min()
                raise ValueError(f"graph {row} has an edge to node {wrong}, and its nodes are 0 to {size - 1}.")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.label_names = None if label_names is None else list(label_names)
        ptr = np.concatenate([[0], sizes.cumsum()])
        edge_ptr = np.concatenate([[0], np.cumsum([edge.shape[1] for edge in arrays])]).astype(np.int64)
        joined = np.concatenate([edge + start for edge, start in zip(arrays, ptr[:-1], strict=True)], axis=1)
        degrees = np.bincount(joined[1], minlength=ptr[-1])
        stacked = None if attributes is None else _stack(attributes, sizes)
        if not isinstance(features, NodeFeatures):
            features = NodeFeatures.fit(features, degrees, stacked, walk_length)
        self.features = features
        structure = {
            "edge_index": torch.from_numpy(joined),
            "batch": torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
            "ptr": torch.from_numpy(ptr),
            "edge_ptr": torch.from_numpy(edge_ptr),
        }
        self.graphs: Graphs = {"x": features(structure, degrees, stacked), **structure}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"graph {row} of {len(self)} does not exist")
        return {**self.batch([row]), "label": int(self.labels[row])}

    def batch(self, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """The graphs of the given rows side by side; see [`select_graphs`]."""
        return select_graphs(self.graphs, torch.as_tensor(np.asarray(rows, dtype=np.int64)))

    @classmethod
    def from_data_list(cls, graphs: Sequence[Any], **kwargs: Any) -> GraphDataset:
        """From torch_geometric's `Data` objects, each with `num_nodes`, `edge_index`, `y` and perhaps `x`."""
        attributes = [graph.x for graph in graphs]
        lacking = [row for row, x in enumerate(attributes) if x is None]
        if lacking and len(lacking) < len(attributes):
            raise ValueError(f"graph {lacking[0]} has no features x, and others have; give all of them features.")
        return cls(
            [graph.num_nodes for graph in graphs],
            [graph.edge_index.numpy() for graph in graphs],
            [int(graph.y) for graph in graphs],
            None if lacking else [x.numpy() for x in attributes],
            **kwargs,
        )


def _edges(row: int, edges: Any) -> np.ndarray:
    array = np.asarray(edges, dtype=np.int64)
    if array.size == 0:
        return array.reshape(2, 0)
    if array.ndim != 2 or len(array) != 2:
        raise ValueError(f"graph {row} has edges of shape {array.shape}; give two rows, sources and targets.")
    return array


def _stack(attributes: Sequence[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    arrays = [np.asarray(array, dtype=np.float32) for array in attributes]
    for row, (array, size) in enumerate(zip(arrays, sizes, strict=True)):
        if array.ndim != 2 or len(array) != size:
            raise ValueError(
                f"graph {row} has {size} nodes and features of shape {array.shape}; give one row per node."
            )
        if array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"graph {row} has {array.shape[1]} features per node, and graph 0 has {arrays[0].shape[1]}."
            )
    return np.concatenate(arrays)
