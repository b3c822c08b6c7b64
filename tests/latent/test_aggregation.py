from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.latent import EmbeddingSet, RelativeProjector, aggregate_latent_spaces, linear_cka, select_anchors

from .conftest import as_dicts
from .reference import aggregate


ANCHORS = [3, 0, 8, 5, 11, 14, 2]


def test_one_set_is_its_relative_space(make_sets):
    (space,), _ = make_sets({"a": list(range(20))})
    found = aggregate_latent_spaces([space], ANCHORS)
    torch.testing.assert_close(found.embeddings, RelativeProjector(ANCHORS).fit(space).transform(space.embeddings))
    assert torch.equal(found.labels, space.labels) and found.ids.tolist() == list(range(20))
    assert found.anchors.tolist() == ANCHORS and bool(found.sources.all()) and found.tasks == ["a"]


@pytest.mark.parametrize(
    "known",
    [
        {"a": list(range(20)), "b": list(range(20)), "c": list(range(20))},
        {"a": list(range(30)), "b": [*range(15), *range(30, 40)]},
        {"b": [*range(15), 20, 17], "a": [*range(15), 18, 16]},
    ],
    ids=["shared", "partly shared", "disjoint but for anchors"],
)
def test_shared_samples_are_averaged_and_others_united(make_sets, known):
    sets, _ = make_sets(known, widths=[12, 9, 15])
    ids, expected = aggregate(as_dicts(sets), ANCHORS)
    found = aggregate_latent_spaces(sets, ANCHORS)
    assert found.ids.tolist() == ids and found.tasks == sorted(known)
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-6)
    assert found.sources.tolist() == [[sample in known[task] for task in sorted(known)] for sample in ids]
    classes = {i: int(c) for s in sets for i, c in zip(s.ids.tolist(), s.labels, strict=True)}
    assert found.labels.tolist() == [classes[i] for i in ids]


def test_first_takes_the_space_whose_name_sorts_first(make_sets):
    sets, _ = make_sets({"b": list(range(20)), "a": [*range(15), 30]})
    ids, expected = aggregate(as_dicts(sets), ANCHORS, uses=lambda sample, rows: [min(rows)])
    found = aggregate_latent_spaces(sets, ANCHORS, duplicates="first")
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-6)
    assert found.sources.sum(1).tolist() == [1] * len(ids)


def test_order_and_chunks_change_nothing(make_sets):
    sets, _ = make_sets({"a": list(range(30)), "b": [*range(15), *range(30, 40)], "c": list(range(25))})
    found = aggregate_latent_spaces(sets, ANCHORS)
    shuffled = [s.select(s.ids[np.random.default_rng(1).permutation(len(s))]) for s in sets[::-1]]
    assert torch.equal(aggregate_latent_spaces(shuffled, ANCHORS).embeddings, found.embeddings)
    for size in (1, 7):
        other = aggregate_latent_spaces(shuffled, ANCHORS, chunk_size=size)
        torch.testing.assert_close(other.embeddings, found.embeddings, rtol=0, atol=1e-6)
        assert torch.equal(other.sources, found.sources)


def test_averaging_noisy_rotations_recovers_the_planted_space_better_than_any_copy(make_sets):
    known = {task: list(range(300)) for task in "abcde"}
    sets, planted = make_sets(known, width=24, noise=1.0)
    anchors = select_anchors(sets, 64)
    truth = torch.tensor(np.array([planted[i] for i in range(300)]))
    truth = EmbeddingSet("truth", range(300), truth)
    rest = truth.drop(anchors).ids
    goal = RelativeProjector(anchors).fit(truth).transform(truth.select(rest).embeddings)
    single = [linear_cka(aggregate_latent_spaces([s], anchors).select(rest).embeddings, goal) for s in sets]
    merged = linear_cka(aggregate_latent_spaces(sets, anchors).select(rest).embeddings, goal)
    # The mean of five has a fifth of the noise's variance.
    assert 1 - merged < (1 - max(single)) / 2


def test_on_disjoint_samples_the_union_beats_the_naive_union(make_sets):
    anchors = list(range(40))
    sets, planted = make_sets({"a": [*anchors, *range(40, 140)], "b": [*anchors, *range(140, 240)]}, noise=0.3)
    merged = aggregate_latent_spaces(sets, anchors).drop(anchors)
    truth = torch.tensor(np.array([planted[i] for i in merged.ids.tolist()]))
    naive = torch.cat([s.drop(anchors).embeddings / s.embeddings.norm(dim=1).mean() for s in sets])
    assert merged.ids.tolist() == list(range(40, 240))
    assert linear_cka(merged.embeddings, truth) > linear_cka(naive, truth) + 0.1


def test_anchors_may_be_chosen_here(make_sets):
    sets, _ = make_sets({"a": list(range(30)), "b": list(range(5, 40))})
    found = aggregate_latent_spaces(sets, num_anchors=6, strategy="balanced", seed=4)
    assert found.anchors.tolist() == select_anchors(sets, 6, "balanced", seed=4)
    with pytest.raises(ValueError, match="num_anchors: only for choosing anchors, and anchors are given"):
        aggregate_latent_spaces(sets, ANCHORS, num_anchors=6)


def test_labels_come_from_whoever_knows_them(make_sets):
    sets, _ = make_sets({"a": list(range(20)), "b": list(range(25))})
    bare = [EmbeddingSet("a", sets[0].ids, sets[0].embeddings), sets[1].select(range(20))]
    extra = EmbeddingSet("c", [*ANCHORS, 99], torch.rand(8, 2))
    found = aggregate_latent_spaces([*bare, extra], ANCHORS)
    assert found.labels.tolist() == [*bare[1].labels.tolist(), -1]
    assert aggregate_latent_spaces([bare[0]], ANCHORS).labels is None


def test_bad_input_is_one_sentence(make_sets):
    sets, _ = make_sets({"a": list(range(20)), "b": list(range(20))})
    a, b = sets
    with pytest.raises(ValueError, match="The sample 2 has the label 0 in the space 'b' and 2 in another"):
        aggregate_latent_spaces(
            [a, EmbeddingSet("b", b.ids, b.embeddings, [*b.labels[:2], 0, *b.labels[3:]])], ANCHORS
        )
    with pytest.raises(KeyError, match="the space 'b' lacks the ids 3; embed these samples too"):
        aggregate_latent_spaces([a, b.drop([3])], ANCHORS)
    with pytest.raises(ValueError, match="1 anchors were given"):
        aggregate_latent_spaces(sets, [3])
    zero = EmbeddingSet("b", b.ids, torch.from_numpy(np.where(b.ids == 19, 0.0, 1.0))[:, None] * b.embeddings)
    with pytest.raises(ValueError, match="the space 'b' is zero at the ids 19, where a cosine means nothing"):
        aggregate_latent_spaces([a, zero], ANCHORS)
    with pytest.raises(KeyError, match="Unknown duplicates 'last'; known ones are mean, first"):
        aggregate_latent_spaces(sets, ANCHORS, duplicates="last")
    with pytest.raises(KeyError, match="Unknown routing 'knm'; did you mean 'knn'?"):
        aggregate_latent_spaces(sets, ANCHORS, routing="knm")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        aggregate_latent_spaces(sets, ANCHORS, chunk_size=0)
    with pytest.raises(ValueError, match="No embedding sets"):
        aggregate_latent_spaces([], ANCHORS)
