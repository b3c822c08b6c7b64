"""Sets of graphs with base and novel classes: from a folder of Parquet files, or torch_geometric's TUDataset."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pyarrow import parquet

from ..seeding import derive_seed
from .episodes import check_class_split, class_indices
from .graphs import GraphDataset, NodeFeatures
from .require import torch_geometric


_SPLITS = ("train", "validation", "test")
_COLUMNS = ("num_nodes", "edge_index", "label")


@dataclass
class GraphSet:
    """Graphs of base classes to train and validate on, and of novel classes to test on.

    Attributes:
        train, validation, test: the graphs.
        base, novel: labels of the classes.
    """

    train: GraphDataset
    validation: GraphDataset
    test: GraphDataset
    base: list[int]
    novel: list[int]


def load_graph_set(folder: str | os.PathLike, features: str | NodeFeatures = "auto", walk_length: int = 0) -> GraphSet:
    """Reads `train.parquet`, `validation.parquet`, `test.parquet` and `classes_split.json` of a folder.

    Columns are `num_nodes`, `edge_index` (two lists, sources and targets), `label` and perhaps `x` (features of each
    node). The split, `{"train": [...], "test": [...]}`, names classes; labels are their places among the names.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        features (`str` or [`NodeFeatures`], *optional*, defaults to `"auto"`): A kind of [`NodeFeatures`], fitted on the
            training graphs, or those themselves, so that several sets share them.
        walk_length (`int`, *optional*, defaults to 0): See [`GraphDataset`].

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a column is missing, base and novel classes overlap, or a part holds graphs of the wrong ones.
    """
    path = Path(folder)
    for name in (*(f"{split}.parquet" for split in _SPLITS), "classes_split.json"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"graph set {str(folder)!r} has no file {name}")
    tables = {split: _table(path / f"{split}.parquet") for split in _SPLITS}
    names = getattr(tables["train"].features["label"], "names", None)
    split = json.loads((path / "classes_split.json").read_text(encoding="utf-8"))
    base, novel = (class_indices(split[part], names, "classes_split.json") for part in ("train", "test"))
    kind: str | NodeFeatures = features
    parts: dict[str, GraphDataset] = {}
    for part, table in tables.items():
        columns = table.with_format("numpy")[:]
        parts[part] = GraphDataset(
            columns["num_nodes"],
            [np.stack(list(edges)) for edges in columns["edge_index"]],
            columns["label"],
            [np.stack(list(x)) for x in columns["x"]] if "x" in columns else None,
            features=kind,
            label_names=names,
            walk_length=walk_length,
        )
        kind = parts["train"].features
    return _checked(GraphSet(**parts, base=base, novel=novel))


def load_tu_dataset(
    name: str,
    root: str | os.PathLike,
    base: Sequence[int],
    novel: Sequence[int],
    features: str = "auto",
    validation: float = 0.2,
    seed: int = 0,
    walk_length: int = 0,
) -> GraphSet:
    """Downloads a set of https://chrsmrrs.github.io/datasets through torch_geometric and splits it.

    Args:
        name (`str`): Such as `"COIL-DEL"` or `"ENZYMES"`.
        root (`str` or `os.PathLike`): Where to keep it.
        base, novel (`Sequence[int]`): Labels, from 0, to train on and to test on.
        features (`str`, *optional*, defaults to `"auto"`): See [`NodeFeatures`].
        validation (`float`, *optional*, defaults to 0.2): Share of each base class's graphs kept for validation.
        seed (`int`, *optional*, defaults to 0): Decides which.
        walk_length (`int`, *optional*, defaults to 0): See [`GraphDataset`].

    Raises:
        ImportError: Without torch_geometric.
        ValueError: If base and novel classes overlap.
    """
    torch_geometric()
    from torch_geometric.datasets import TUDataset

    check_class_split(base, novel)
    # Attributes of nodes come in `x` only when asked for.
    graphs = list(TUDataset(str(root), name, use_node_attr=True))
    return split_graphs(graphs, base, novel, features, validation, seed, walk_length)


def split_graphs(
    graphs: Sequence[Any],
    base: Sequence[int],
    novel: Sequence[int],
    features: str = "auto",
    validation: float = 0.2,
    seed: int = 0,
    walk_length: int = 0,
) -> GraphSet:
    """Splits graphs by class, and those of base classes into training and validation.

    Args:
        graphs (`Sequence[Data]`): torch_geometric's, each with `num_nodes`, `edge_index`, `y` and perhaps `x`.
        base, novel, features, validation, seed, walk_length: As in [`load_tu_dataset`].

    Raises:
        ValueError: If base and novel classes overlap.
    """
    check_class_split(base, novel)
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; it is a share, above 0 and below 1.")
    labels = np.array([int(graph.y) for graph in graphs])
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label in sorted(base):
        own = np.flatnonzero(labels == label)
        own = own[np.argsort(np.random.default_rng(derive_seed("validation", seed, label)).random(len(own)))]
        kept = round(validation * len(own))
        rows["validation"] += sorted(own[:kept].tolist())
        rows["train"] += sorted(own[kept:].tolist())
    rows["test"] = np.flatnonzero(np.isin(labels, list(novel))).tolist()
    parts: dict[str, GraphDataset] = {}
    kind: str | NodeFeatures = features
    for part, chosen in rows.items():
        chosen_graphs = [graphs[row] for row in chosen]
        parts[part] = GraphDataset.from_data_list(chosen_graphs, features=kind, walk_length=walk_length)
        kind = parts["train"].features
    return _checked(GraphSet(**parts, base=sorted(base), novel=sorted(novel)))


def _table(path: Path) -> Any:
    # As a table in memory: `from_parquet` would leave a copy in the cache.
    table = Dataset(parquet.read_table(path))
    for column in _COLUMNS:
        if column not in table.column_names:
            raise ValueError(f"{path.name} has no column {column!r}; its columns are {', '.join(table.column_names)}.")
    return table


def _checked(graph_set: GraphSet) -> GraphSet:
    check_class_split(graph_set.base, graph_set.novel)
    for part, wanted in (("train", graph_set.base), ("validation", graph_set.base), ("test", graph_set.novel)):
        other = sorted(set(getattr(graph_set, part).labels.tolist()) - set(wanted))
        if other:
            kind = "novel" if part == "test" else "base"
            raise ValueError(f"the {part} graphs hold class {other[0]}, which is not a {kind} class.")
    return graph_set
