"""The graph encoder against NumPy, and its independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.fewshot import (
    FewShotModel,
    FewShotTrainer,
    GINEncoder,
    GraphDataset,
    NodeFeatures,
    load_tu_dataset,
    node_statistics,
    split_graphs,
)

from . import reference
from .test_graphs import random_graphs


pytest.importorskip("torch_geometric", reason="install the extra `graphs`")


def graphs(count=12, seed=0, width=4):
    sizes, edges, labels, attributes = random_graphs(count, seed, width=width)
    return GraphDataset(sizes, edges, labels, attributes)


def encoder(**changes):
    torch.manual_seed(0)
    made = GINEncoder(**{"in_features": 4, "hidden_size": 12, **changes}).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def array(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_embeddings_equal_the_reference(pooling):
    model = encoder(pooling=pooling, num_layers=3).double()
    sizes, edges, _, attributes = random_graphs(width=4)
    data = graphs()
    layers = []
    for network in model.layers:
        norm = network.norms[0].module if hasattr(network.norms[0], "module") else network.norms[0]
        layers.append(
            {
                "w1": array(network.lins[0].weight),
                "b1": array(network.lins[0].bias),
                "w2": array(network.lins[1].weight),
                "b2": array(network.lins[1].bias),
                "weight": array(norm.weight),
                "bias": array(norm.bias),
                "mean_scale": array(norm.mean_scale),
            }
        )
    first, norm, _, last = model.post
    post = {
        "w1": array(first.weight),
        "b1": array(first.bias),
        "weight": array(norm.weight),
        "bias": array(norm.bias),
        "w2": array(last.weight),
        "b2": array(last.bias),
    }
    batch = data.batch(range(len(data)))
    batch["x"] = batch["x"].double()
    for row, embedding in enumerate(array(model(batch))):
        x = attributes[row].astype(np.float32).astype(np.float64)
        assert np.allclose(embedding, reference.gin(x, edges[row].T, layers, post, pooling), rtol=1e-6, atol=1e-8)


def test_embeddings_do_not_depend_on_the_batch():
    model, data = encoder(dropout=0.5), graphs()
    together = model(data.batch(range(12)))
    alone = torch.cat([model(data.batch([row])) for row in range(12)])
    assert torch.allclose(together, alone, atol=1e-5)
    order = torch.randperm(12)
    assert torch.allclose(model(data.batch(order.numpy())), together[order], atol=1e-5)


def test_normalising_by_episode_depends_on_the_episode_alone():
    model, data = encoder(norm="episode"), graphs()
    assert model.per_episode
    groups = torch.tensor([0] * 5 + [1] * 7)
    both = model(data.batch(range(12)), groups=groups)
    assert torch.allclose(both[:5], model(data.batch(range(5))), atol=1e-5)
    assert torch.allclose(both[5:], model(data.batch(range(5, 12))), atol=1e-5)
    assert not torch.allclose(both[:5], model(data.batch(range(12)))[:5], atol=1e-2)


def test_film_reaches_every_place():
    model, data = encoder(), graphs()
    batch, groups = data.batch(range(12)), torch.arange(12) % 2
    plain, ones, zeros = model(batch), torch.ones(2, 3, 12), torch.zeros(2, 3, 12)
    assert torch.allclose(model(batch, (ones, zeros), groups), plain, atol=1e-6)
    for layer in range(3):
        gammas = ones.clone()
        gammas[1, layer] = 0.3
        changed = model(batch, (gammas, zeros), groups)
        assert torch.allclose(changed[::2], plain[::2], atol=1e-5)
        assert not torch.allclose(changed[1::2], plain[1::2], atol=1e-2)
    betas = zeros.clone()
    betas[:, 2] = 5.0
    assert torch.allclose(model(batch, (ones, betas), groups), plain + 5, atol=1e-4), "mean pool keeps a shift"


@pytest.mark.parametrize("conditioning", [False, True])
def test_a_graph_model_trains_saves_and_loads(settings, tmp_path, conditioning):
    data = graphs(60, width=4)
    model = FewShotModel.from_encoder(encoder(), conditioning=conditioning, scale="auto")
    config = settings(k_shot=2, n_query=3, conditioning=conditioning, mixup_weight=0.1, num_train_epochs=1)
    trainer = FewShotTrainer(model, config, None, data, data)
    trainer.train()
    before = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = FewShotModel.from_pretrained(tmp_path / "saved")
    after = FewShotTrainer(loaded, config, None, data, data).evaluate()
    names = ("eval_loss", "eval_accuracy", "eval_macro_f1")
    assert [before[name] for name in names] == pytest.approx([after[name] for name in names], rel=1e-5)


def test_a_torch_geometric_batch_is_taken_as_it_is():
    from torch_geometric.data import Batch, Data

    sizes, edges, labels, attributes = random_graphs(width=4)
    listed = [
        Data(x=torch.from_numpy(x).float(), edge_index=torch.from_numpy(edge), y=torch.tensor(int(y)))
        for x, edge, y in zip(attributes, edges, labels, strict=True)
    ]
    model, data = encoder(), GraphDataset.from_data_list(listed)
    assert torch.allclose(model(Batch.from_data_list(listed)), model(data.batch(range(12))), atol=1e-6)
    parts = split_graphs(listed, [0, 1], [2], validation=0.25)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (6, 2, 4)
    assert set(parts.test.labels.tolist()) == {2}
    again = split_graphs(listed, [1, 0], [2], validation=0.25)
    assert torch.equal(again.train.graphs["x"], parts.train.graphs["x"])
    with pytest.raises(ValueError, match="validation is 1.0"):
        split_graphs(listed, [0, 1], [2], validation=1.0)


def test_walks_return_as_powers_of_the_transition_matrix_say():
    sizes, edges, labels, attributes = random_graphs(width=2)
    data = GraphDataset(sizes, edges, labels, attributes, walk_length=4)
    assert data.features == NodeFeatures("attributes", 6, 4)
    for row in range(len(data)):
        adjacency = np.zeros((sizes[row], sizes[row]))
        adjacency[edges[row][0], edges[row][1]] = 1
        transition = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
        expected = [np.diag(np.linalg.matrix_power(transition, steps)) for steps in (1, 2, 3, 4)]
        x = data.batch([row])["x"].numpy()
        assert np.allclose(x[:, :2], attributes[row]) and np.allclose(x[:, 2:], np.stack(expected, 1), atol=1e-6)
    # As wide as the features they were fitted with, whatever is asked for; batches differ in nothing.
    other = GraphDataset(sizes[:3], edges[:3], labels[:3], attributes[:3], features=data.features)
    assert torch.equal(other.graphs["x"], data.batch([0, 1, 2])["x"])
    sums = node_statistics(data, walk_length=4)[:, -4:]
    for row in range(len(data)):
        assert np.allclose(sums[row], data.batch([row])["x"][:, 2:].sum(0), atol=1e-6)
    with pytest.raises(ValueError, match="walk_length is -1; it must be a whole number, at least 0"):
        GraphDataset(sizes, edges, labels, walk_length=-1)
    with pytest.raises(ValueError, match="walk_length is 'long'"):
        GraphDataset(sizes, edges, labels, walk_length="long")


def test_walks_on_a_large_graph_are_the_same_and_silent(recwarn):
    ring = np.arange(2001)
    edges = np.stack([np.concatenate([ring, (ring + 1) % 2001]), np.concatenate([(ring + 1) % 2001, ring])])
    walks = GraphDataset([2001], [edges], [0], features="degree", walk_length=4).graphs["x"][:, -4:]
    assert torch.allclose(walks, torch.tensor([0, 1 / 2, 0, 3 / 8]).expand(2001, 4), atol=1e-6)
    assert not [warning for warning in recwarn if "Sparse CSR" in str(warning.message)]


def test_a_tu_dataset_is_split_by_class(monkeypatch, tmp_path):
    from torch_geometric import datasets
    from torch_geometric.data import Data

    def download(root, name, use_node_attr):
        assert (root, name, use_node_attr) == (str(tmp_path), "COIL-DEL", True)
        sizes, edges, labels, _ = random_graphs(30)
        return [
            Data(num_nodes=int(size), edge_index=torch.from_numpy(edge), y=torch.tensor([int(y)]))
            for size, edge, y in zip(sizes, edges, labels, strict=True)
        ]

    monkeypatch.setattr(datasets, "TUDataset", download)
    walks = load_tu_dataset("COIL-DEL", tmp_path, base=[0, 2], novel=[1], walk_length=3)
    assert walks.train.features.walk_length == walks.test.features.walk_length == 3
    parts = load_tu_dataset("COIL-DEL", tmp_path, base=[0, 2], novel=[1])
    assert walks.train.features.size == parts.train.features.size + 3
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (16, 4, 10)
    assert parts.train.features.kind == "degree" and set(parts.validation.labels.tolist()) == {0, 2}
    with pytest.raises(ValueError, match="classes 1 are both base and novel"):
        load_tu_dataset("COIL-DEL", tmp_path, base=[0, 1], novel=[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GINEncoder(0), "in_features is 0"),
        (lambda: GINEncoder(3, num_layers=0), "num_layers is 0"),
        (lambda: GINEncoder(3, pooling="max"), "pooling is 'max'; known: mean, sum"),
        (lambda: GINEncoder(3, norm="batch"), "norm is 'batch'; known: graph, episode"),
        (lambda: GINEncoder(3, dropout=1.0), "dropout is 1.0"),
        (lambda: encoder(in_features=5)(graphs().batch([0])), "4 features per node, and the encoder takes 5"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
