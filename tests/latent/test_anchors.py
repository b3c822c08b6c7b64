from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.latent import EmbeddingSet, select_anchors

from .reference import farthest


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(1)
    ids = [f"s{number:02d}" for number in range(40)]
    first = EmbeddingSet("a", ids, torch.randn(40, 5, generator=generator), [number % 4 for number in range(40)])
    return [first, EmbeddingSet("b", ids[::-1][:36], torch.randn(36, 3, generator=generator))]


@pytest.mark.parametrize("strategy", ["random", "balanced", "farthest", "kmeans"])
def test_anchors_are_distinct_common_and_independent_of_order(sets, strategy):
    found = select_anchors(sets, 9, strategy, seed=3)
    assert len(set(found)) == 9 and all(isinstance(name, str) for name in found)
    assert set(found) <= set(sets[0].ids.tolist()) & set(sets[1].ids.tolist())
    order = np.random.default_rng(0).permutation(36)
    shuffled = [sets[1].select(sets[1].ids[order]), sets[0].select(sets[0].ids[::-1].copy())]
    assert select_anchors(shuffled, 9, strategy, seed=3) == found
    assert select_anchors(sets, 9, strategy, seed=3) == found
    if strategy != "farthest":
        assert found == sorted(found)


@pytest.mark.parametrize("strategy", ["random", "balanced", "farthest"])
def test_the_seed_decides(sets, strategy):
    assert len({tuple(select_anchors(sets, 9, strategy, seed=seed)) for seed in range(5)}) > 1


def test_balanced_takes_equally_many_of_each_class_while_there_are(sets):
    classes = dict(zip(sets[0].ids.tolist(), sets[0].labels.tolist(), strict=True))
    found = [classes[name] for name in select_anchors(sets, 10, "balanced")]
    assert sorted(found.count(label) for label in range(4)) == [2, 2, 3, 3]
    few = EmbeddingSet("c", range(10), torch.rand(10, 2), [0, *[1] * 9])
    assert sorted(select_anchors([few], 5, "balanced"))[0] == 0


def test_farthest_is_greedy_over_all_spaces_side_by_side(sets):
    found = select_anchors(sets, 8, "farthest", seed=2)
    common = sorted(sets[1].ids.tolist())
    rows = []
    for space in sets:
        part = space.select(common).embeddings.double().numpy()
        rows.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    expected = farthest(np.concatenate(rows, axis=1), common.index(found[0]), 8)
    assert found == [common[row] for row in expected]


def test_kmeans_takes_one_sample_of_each_tight_cluster():
    centres = torch.eye(6).repeat_interleave(5, 0)
    space = EmbeddingSet("a", range(30), centres + 0.01 * torch.randn(30, 6))
    found = select_anchors([space], 6, "kmeans")
    assert sorted(number // 5 for number in found) == list(range(6))


def test_candidates_limit_the_choice(sets):
    candidates = ["s10", "s11", "s30"]
    assert select_anchors(sets, 3, candidates=candidates) == candidates
    with pytest.raises(KeyError, match="the space 'b' lacks the ids 's00'"):
        select_anchors(sets, 2, candidates=["s00", "s10"])


def test_bad_input_is_one_sentence(sets):
    with pytest.raises(KeyError, match="Unknown strategy 'farthst'; did you mean 'farthest'?"):
        select_anchors(sets, 4, "farthst")
    with pytest.raises(ValueError, match="num_anchors is 1; relative coordinates need at least two"):
        select_anchors(sets, 1)
    with pytest.raises(ValueError, match="num_anchors is 256, but the spaces share 36 samples"):
        select_anchors(sets)
    with pytest.raises(ValueError, match="No embedding sets were given"):
        select_anchors([])
    with pytest.raises(ValueError, match="Balanced anchors need labels"):
        select_anchors(sets[1:], 4, "balanced")
    with pytest.raises(ValueError, match="Several embedding sets are called 'a'"):
        select_anchors([sets[0], sets[0]], 4)
    with pytest.raises(ValueError, match="numbers for ids and others text"):
        select_anchors([sets[0], EmbeddingSet("c", range(5), torch.rand(5, 2))], 4)
