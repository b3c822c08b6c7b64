"""Graphs as one block: cut out right, described right, refused where they are wrong. Needs no torch_geometric."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from hf_atm.fewshot import GINEncoder, GraphDataset, NodeFeatures, load_graph_set, select_graphs


DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "graphs"


def random_graphs(count=12, seed=0, most=7, width=None):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, most + 1, count)
    edges = []
    for size in sizes:
        upper = np.argwhere(np.triu(generator.random((size, size)) < 0.5, 1)).reshape(-1, 2)
        edges.append(np.concatenate([upper, upper[:, ::-1]]).T)
    attributes = None if width is None else [generator.normal(size=(size, width)) for size in sizes]
    return sizes, edges, np.arange(count) % 3, attributes


def test_batches_hold_the_graphs_asked_for():
    sizes, edges, labels, attributes = random_graphs(width=4)
    data = GraphDataset(sizes, edges, labels, attributes)
    assert len(data) == 12 and data.features == NodeFeatures("attributes", 4)
    rows = [3, 0, 3, 11]
    batch = data.batch(rows)
    assert batch["ptr"].diff().tolist() == sizes[rows].tolist()
    assert batch["batch"].tolist() == np.repeat(np.arange(4), sizes[rows]).tolist()
    for place, row in enumerate(rows):
        start, end = batch["ptr"][place : place + 2]
        assert np.allclose(batch["x"][start:end].numpy(), attributes[row])
        first, last = batch["edge_ptr"][place : place + 2]
        assert np.array_equal(batch["edge_index"][:, first:last].numpy() - int(start), edges[row])
    # Cut from a batch, they are the same as cut from the whole.
    again, straight = select_graphs(batch, torch.tensor([3, 1])), data.batch([11, 0])
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    single = data[5]
    assert single["label"] == 2 and len(single["x"]) == sizes[5]


def test_degrees_are_one_hot_and_capped_at_the_training_maximum():
    star = np.array([[0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]])
    train = GraphDataset([5, 4], [np.array([[0, 1], [1, 0]]), star[:, [0, 1, 3, 4]]], [0, 1])
    assert train.features == NodeFeatures("degree", 3)
    assert train.batch([0])["x"].argmax(1).tolist() == [1, 1, 0, 0, 0], "isolated nodes have degree 0"
    test = GraphDataset([4], [star], [2], features=train.features)
    assert test.batch([0])["x"].argmax(1).tolist() == [2, 1, 1, 1]
    assert (test.batch([0])["x"].sum(1) == 1).all()
    log = GraphDataset([4], [star], [0], features="log_degree")
    assert log.batch([0])["x"].argmax(1).tolist() == [2, 1, 1, 1] and log.features.size == 3
    hub = np.array([[0] * 200 + list(range(1, 201)), list(range(1, 201)) + [0] * 200])
    assert GraphDataset([201], [hub], [0]).features == NodeFeatures("log_degree", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "there is no graph"),
        (([2, 0], [[[0, 1], [1, 0]], []], [0, 1]), "graph 1 has no nodes"),
        (([2, 2], [[[0, 1], [1, 0]], [[0, 2], [2, 0]]], [0, 1]), "graph 1 has an edge to node 2, and its nodes are 0"),
        (([2], [[[0, 1], [1, 0]]], [0], None, "attributes"), "features='attributes' need a column x"),
        (([2], [[[0, 1], [1, 0]]], [0], None, "colour"), "features is 'colour'; known: auto, attributes"),
        (([2, 1], [[[0, 1], [1, 0]], []], [0, 1], [np.ones((2, 3)), np.ones((1, 4))]), "graph 1 has 4 features per"),
        (([2], [[[0, 1], [1, 0]]], [0], [np.ones((1, 3))]), "graph 0 has 2 nodes and features of shape \\(1, 3\\)"),
        (
            ([2], [[[0, 1], [1, 0]]], [0], [np.ones((2, 3))], NodeFeatures("attributes", 4)),
            "3 features per node, and the training graphs 4",
        ),
        (([2], [[[0, 1], [1, 0], [0, 1]]], [0]), "graph 0 has edges of shape \\(3, 2\\); give two rows"),
        (([2], [], [0]), "1 graphs, 0 lists of edges and 1 labels"),
    ],
)
def test_bad_graphs_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        GraphDataset(*arguments)
    assert "\n" not in str(error.value)


def write(folder, split=None, train=(0, 1), test=(2,), drop=(), names=("1", "2", "3")):
    features = datasets.Features(
        {
            "num_nodes": datasets.Value("int32"),
            "edge_index": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
            "label": datasets.ClassLabel(names=list(names)),
        }
    )
    for part, classes in (("train", train), ("validation", train), ("test", test)):
        rows = [
            {"num_nodes": 3, "edge_index": [[0, 1], [1, 0]], "label": label} for label in classes for _ in range(2)
        ]
        table = datasets.Dataset.from_list(rows, features=features).remove_columns(list(drop))
        table.to_parquet(str(folder / f"{part}.parquet"))
    (folder / "classes_split.json").write_text(json.dumps(split or {"train": [1, 2], "test": [3]}))
    return folder


def test_a_folder_is_read_with_labels_by_name(tmp_path):
    graphs = load_graph_set(write(tmp_path))
    assert (graphs.base, graphs.novel) == ([0, 1], [2]), "the split names classes; labels are their places"
    assert graphs.train.labels.tolist() == [0, 0, 1, 1] and graphs.test.labels.tolist() == [2, 2]
    assert graphs.test.features == graphs.train.features and graphs.train.label_names == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": {"train": [1, 2], "test": [2, 3]}}, "classes 1 are both base and novel"),
        ({"split": {"train": [0, 1], "test": [3]}}, "names the class 0; the classes are 1, 2, 3"),
        ({"split": {"train": [1], "test": [3]}}, "the train graphs hold class 1, which is not a base class"),
        ({"test": (1, 2)}, "the test graphs hold class 1, which is not a novel class"),
        ({"drop": ["num_nodes"]}, "train.parquet has no column 'num_nodes'"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load_graph_set(write(tmp_path, **changes))
    assert "\n" not in str(error.value)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has no file test.parquet"):
        load_graph_set(tmp_path)


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the graph sets beside the repository")
@pytest.mark.parametrize(
    ("name", "sizes", "novel", "width"),
    [
        ("letter_high", (1320, 330, 591), [4, 6, 8, 11], 6),
        ("triangles", (1127, 280, 603), [1, 4, 9], 11),
        ("enzymes", (320, 80, 200), [1, 3], 18),
    ],
)
def test_the_real_sets_load(name, sizes, novel, width):
    graphs = load_graph_set(DATA / name)
    assert (len(graphs.train), len(graphs.validation), len(graphs.test)) == sizes
    assert graphs.novel == novel and graphs.train.features.size == width
    assert set(graphs.test.labels.tolist()) == set(novel)


def test_without_the_extra_one_sentence_names_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torch_geometric"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'hf-atm\[graphs\]'"):
        GINEncoder(3)
