from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_atm.merging import collect_gram, get_merge_method, merge_state_dicts, merge_task_vectors

from . import reference_gram as reference
from .testing_utils import as_numpy, assert_near, assert_same, random_vectors


SHAPES = {"fc.weight": (4, 6), "fc.bias": (4,), "embed.weight": (5, 3), "conv.weight": (3, 2, 2, 2)}
INPUTS = {"fc.weight": 6, "conv.weight": 8}


def grams(count, inputs=INPUTS, rows=30):
    sizes = {key: (rows, size) for key, size in inputs.items()}
    return [{k: x.T @ x / rows for k, x in v.items()} for v in random_vectors(count, sizes, 50, torch.float64)]


def fishers(count):
    return [{k: x.square() for k, x in v.items()} for v in random_vectors(count, SHAPES, seed=90)]


def measured(method, count=3):
    return grams(count) if method == "regmean" else fishers(count)


@pytest.mark.parametrize("a", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 3.0, 1.0]])
def test_regmean_matches_the_reference(a, weights):
    models, statistics = random_vectors(3, SHAPES, dtype=torch.float64), grams(3)
    merged = merge_task_vectors(models, "regmean", weights, statistics=statistics, a=a)
    shares = np.array(weights) / sum(weights)
    for key in INPUTS:
        flat = [m[key].reshape(len(m[key]), -1) for m in as_numpy(models)]
        expected = reference.regmean(flat, [s[key].numpy() for s in statistics], shares, a)
        np.testing.assert_allclose(merged[key].flatten(1).numpy(), expected, atol=1e-9)
    mean = merge_task_vectors(models, "mean", weights)
    assert {key for key in SHAPES if torch.equal(merged[key], mean[key])} == set(SHAPES) - set(INPUTS)


def test_regmean_recovers_the_least_squares_optimum():
    """Noiseless teachers on their own inputs: the merge is the best single layer on all inputs together."""
    generator = torch.Generator().manual_seed(0)
    layers, data, grams_ = [], [], []
    for size in (40, 25):
        layer = nn.Linear(5, 3, bias=False).double()
        layer.weight.data.copy_(torch.randn(3, 5, generator=generator))
        inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        layers.append(layer)
        data.append((inputs, layer(inputs).detach()))
        grams_.append(collect_gram(layer, [inputs], None, disable_tqdm=True))
    best = torch.linalg.lstsq(*(torch.cat(parts) for parts in zip(*data, strict=True))).solution.T
    # Statistics are means over examples, so that the sizes of the two sets enter as weights.
    merged = merge_state_dicts(layers, method="regmean", weights=[40, 25], statistics=grams_, a=1.0)
    torch.testing.assert_close(merged["weight"], best, atol=1e-12, rtol=0)


def test_equal_gram_matrices_give_the_mean():
    models, statistics = random_vectors(3, SHAPES, dtype=torch.float64), grams(1) * 3
    merged = merge_task_vectors(models, "regmean", statistics=statistics)
    assert_near(merged, merge_task_vectors(models, "mean"), 1e-12)


def test_ridge_leads_to_the_mean():
    models, statistics = random_vectors(2, SHAPES, dtype=torch.float64), grams(2)
    mean = merge_task_vectors(models, "mean")
    gaps = [
        float(
            (
                merge_task_vectors(models, "regmean", statistics=statistics, ridge=r)["fc.weight"] - mean["fc.weight"]
            ).norm()
        )
        for r in (0.0, 1.0, 1e9)
    ]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-7


def test_inputs_that_never_occur_keep_the_mean():
    models, statistics = random_vectors(2, {"w": (3, 4)}, dtype=torch.float64), grams(2, {"w": 4})
    for statistic in statistics:
        statistic["w"][2] = statistic["w"][:, 2] = 0
    merged = merge_task_vectors(models, "regmean", statistics=statistics)["w"]
    mean = merge_task_vectors(models, "mean")["w"]
    torch.testing.assert_close(merged[:, 2], mean[:, 2], atol=1e-12, rtol=0)
    assert not torch.allclose(merged, mean, atol=1e-2)


def test_layouts_are_told_by_statistics_neighbours_and_patterns():
    shapes = {"a.up.weight": (4, 6), "a.up.bias": (4,), "a.square.weight": (5, 5)}
    models = random_vectors(2, shapes, dtype=torch.float64)
    flipped = [{k: x.T.contiguous() if x.ndim == 2 else x for k, x in m.items()} for m in models]
    statistics = grams(2, {"a.up.weight": 6, "a.square.weight": 5})
    straight = merge_task_vectors(models, "regmean", statistics=statistics, names=["x", "y"])
    turned = merge_task_vectors(flipped, "regmean", statistics=statistics, names=["x", "y"])
    for key in ("a.up.weight", "a.square.weight"):
        torch.testing.assert_close(turned[key].T, straight[key], atol=1e-10, rtol=0)
        assert turned[key].is_contiguous()
    # Without the neighbour's bias a square matrix needs to be named.
    alone = [{"a.square.weight": m["a.square.weight"]} for m in flipped]
    kept = merge_task_vectors(alone, "regmean", statistics=statistics)["a.square.weight"]
    assert not torch.allclose(kept.T, straight["a.square.weight"], atol=0.1)
    named = merge_task_vectors(alone, "regmean", statistics=statistics, transposed=["*.square.*"])["a.square.weight"]
    torch.testing.assert_close(named.T, straight["a.square.weight"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 3.0, 1.0]])
def test_fisher_matches_the_reference(weights):
    models, statistics = random_vectors(3, SHAPES, dtype=torch.float64), fishers(3)
    statistics[1] = {key: 1e4 * value for key, value in statistics[1].items()}
    merged = merge_task_vectors(models, "fisher", weights, statistics=statistics)
    assert_near(merged, reference.fisher(as_numpy(models), as_numpy(statistics), weights), 1e-9)


def test_equal_fisher_information_gives_the_mean():
    models, weights = random_vectors(3, SHAPES, dtype=torch.float64), [1.0, 2.0, 0.5]
    mean = merge_task_vectors(models, "mean", weights)
    for statistics in (fishers(1) * 3, [{key: torch.zeros(shape) for key, shape in SHAPES.items()}] * 3):
        assert_near(merge_task_vectors(models, "fisher", weights, statistics=statistics), mean, 1e-9)


def test_fisher_follows_the_model_that_cares():
    models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0])}]
    statistics = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    merged = merge_task_vectors(models, "fisher", statistics=statistics)["w"]
    torch.testing.assert_close(merged, torch.tensor([1.0, 3.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_order_base_copies_and_zero_weights(method):
    models, statistics, names = random_vectors(3, SHAPES), measured(method), ["x", "y", "z"]
    weights, base = [0.3, 0.1, 0.7], random_vectors(1, SHAPES, seed=5)[0]
    results = []
    for order in itertools.permutations(range(3)):
        chosen = {"statistics": [statistics[i] for i in order], "names": [names[i] for i in order]}
        results.append(merge_task_vectors([models[i] for i in order], method, [weights[i] for i in order], **chosen))
    for result in results[1:]:
        assert_same(result, results[0])
    merged = merge_state_dicts(models, base, method, weights, statistics=statistics)
    for key in SHAPES:
        torch.testing.assert_close(merged[key], results[0][key], atol=2e-6, rtol=0)
    assert_same(merge_task_vectors(models[:1], method, statistics=statistics[:1]), models[0])
    assert_same(merge_task_vectors(models[:2], method, [1, 0], statistics=statistics[:2]), models[0])
    copies = merge_task_vectors([models[0]] * 3, method, statistics=statistics)
    for key in SHAPES:
        torch.testing.assert_close(copies[key], models[0][key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_statistics_from_files_and_one_tensor_at_a_time(method, tmp_path):
    models, statistics, names = random_vectors(2, SHAPES), measured(method, 2), ["x", "y"]
    paths = []
    for name, statistic in zip(names, statistics, strict=True):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file(statistic, paths[-1])
    whole = merge_task_vectors(models, method, names=names, statistics=statistics)
    assert_same(merge_task_vectors(models, method, names=names, statistics=paths), whole)
    assert_same(merge_state_dicts(models, method=method, names=names, statistics=paths), whole)
    rule = get_merge_method(method)
    context = rule.find_context(models, [1.0, 1.0], names, {"statistics": paths})
    for key in whole:
        alone = [{key: model[key]} for model in models]
        merged = rule.function(alone, [1.0, 1.0], names, statistics=paths, **context)
        assert torch.equal(merged[key], whole[key]), key


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def changed(mapping, key, value):
    return {**mapping, key: value}


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("regmean", lambda s: s[:1], ["1 statistics for 2 models"]),
        ("fisher", lambda s: s[0], ["list of statistics"]),
        ("regmean", lambda s: [s[0], without(s[1], "fc.weight")], ["'b'", "'fc.weight'"]),
        ("fisher", lambda s: [without(s[0], "fc.bias"), s[1]], ["'a'", "'fc.bias'"]),
        ("regmean", lambda s: [{"model." + k: v for k, v in m.items()} for m in s], ["none", "'fc.weight'"]),
        ("fisher", lambda s: [{}, {}], ["none", "'embed.weight'"]),
        ("regmean", lambda s: [s[0], changed(s[1], "fc.weight", torch.eye(5))], ["'b'", "(5, 5)", "(6, 6)"]),
        ("regmean", lambda s: [changed(m, "fc.weight", torch.eye(7)) for m in s], ["(7, 7)", "(6, 6)"]),
        ("regmean", lambda s: [changed(m, "fc.weight", torch.ones(6)) for m in s], ["(6,)", "(6, 6)"]),
        ("fisher", lambda s: [s[0], changed(s[1], "fc.weight", torch.ones(6, 4))], ["'b'", "(6, 4)", "(4, 6)"]),
        ("fisher", lambda s: [changed(s[0], "fc.bias", -torch.ones(4)), s[1]], ["'a'", "'fc.bias'", "negative"]),
        ("fisher", lambda s: [changed(s[0], "fc.bias", torch.full((4,), float("nan"))), s[1]], ["fc.bias", "finite"]),
        ("regmean", lambda s: [s[0], changed(s[1], "fc.weight", float("inf") * torch.eye(6))], ["of b", "finite"]),
    ],
)
def test_bad_statistics_are_refused_in_one_sentence(method, change, words):
    models, statistics = random_vectors(2, SHAPES), change(measured(method, 2))
    with pytest.raises(ValueError) as error:
        merge_task_vectors(models, method, names=["a", "b"], statistics=statistics)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_bad_keywords_and_weights(method, tmp_path):
    models, statistics = random_vectors(2, SHAPES), measured(method, 2)
    with pytest.raises(ValueError, match="needs a value for statistics"):
        merge_task_vectors(models, method)
    for weights in ([1, -1], [2, -1]):
        with pytest.raises(ValueError, match=f"'{method}' takes no negative weights"):
            merge_task_vectors(models, method, weights, statistics=statistics)
    with pytest.raises(ValueError, match="sum to zero"):
        merge_task_vectors(models, method, [0, 0], statistics=statistics)
    (tmp_path / "x.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="not a safetensors file"):
        merge_task_vectors(models, method, statistics=[str(tmp_path / "x.bin")] * 2)


def test_ridge_and_a_have_ranges():
    models, statistics = random_vectors(2, SHAPES), grams(2)
    for name, value in (("a", 1.5), ("ridge", -1.0), ("ridge", float("inf"))):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            merge_task_vectors(models, "regmean", statistics=statistics, **{name: value})
