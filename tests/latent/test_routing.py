from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from hf_atm.latent import EmbeddingSet, aggregate_latent_spaces
from hf_atm.latent.routing import ROUTERS

from .conftest import as_dicts
from .reference import aggregate, mahalanobis, top_cosine


ANCHORS = list(range(8))
ROUTED = range(60, 90)


@pytest.fixture
def sets(make_sets):
    """Everyone knows every sample; 8 to 33 belong to a, 30 to 59 to b, the rest to nobody."""
    everything, _ = make_sets({"a": list(range(90)), "b": list(range(90))}, widths=[12, 7], noise=1.0)
    own = {"a": range(8, 34), "b": range(30, 60)}
    return [dataclasses.replace(s, own=torch.tensor([i in own[s.task] for i in s.ids.tolist()])) for s in everything]


def expected(sets, chosen):
    own = {s.task: set(s.ids[s.own.numpy()].tolist()) for s in sets}

    def uses(sample, rows):
        owners = [task for task in rows if sample in own[task]]
        if sample in ANCHORS:
            return list(rows)
        return owners or [chosen[sample]]

    return aggregate(as_dicts(sets), ANCHORS, uses)[1]


@pytest.mark.parametrize("routing", ["knn", "mahalanobis", "confidence"])
def test_samples_without_an_owner_go_where_they_fit_best(sets, routing):
    scores = {}
    for s in sets:
        mine, rows = s.select(s.ids[s.own.numpy()]), s.select(list(ROUTED)).embeddings
        own, x = mine.embeddings.double().numpy(), rows.double().numpy()
        if routing == "knn":
            scores[s.task] = top_cosine(x, own)
        elif routing == "mahalanobis":
            means = np.array([own[mine.labels == c].mean(0) for c in range(3)])
            covariance = LedoitWolf(assume_centered=True).fit(own - means[mine.labels]).covariance_
            scores[s.task] = -mahalanobis(x, own, mine.labels, covariance)
        else:
            from sklearn.linear_model import LogisticRegression

            mean, deviation = own.mean(0), own.std(0)
            model = LogisticRegression(max_iter=2000, tol=1e-8).fit((own - mean) / deviation, mine.labels)
            scores[s.task] = model.predict_proba((x - mean) / deviation).max(1)
    chosen = {sample: max(scores, key=lambda task: scores[task][n]) for n, sample in enumerate(ROUTED)}
    margin = np.abs(scores["a"] - scores["b"])
    clear = [sample for n, sample in enumerate(ROUTED) if margin[n] > 1e-3]
    assert len({chosen[sample] for sample in clear}) == 2 and len(clear) > 20
    found = aggregate_latent_spaces(sets, ANCHORS, routing=routing, chunk_size=11)
    rows = found.positions([i for i in found.ids.tolist() if i < 60 or i in clear])
    np.testing.assert_allclose(found.embeddings[rows], expected(sets, chosen)[rows], atol=1e-5)
    again = aggregate_latent_spaces(sets[::-1], ANCHORS, routing=routing)
    assert torch.equal(again.sources, found.sources)


def test_oracle_takes_the_owners_of_every_sample(sets):
    marked = [
        dataclasses.replace(s, own=s.own | torch.from_numpy((s.ids >= 60) & (s.ids % 2 == n)))
        for n, s in enumerate(sets)
    ]
    found = aggregate_latent_spaces(marked, ANCHORS, routing="oracle")
    np.testing.assert_allclose(
        found.embeddings, expected(marked, {sample: "ab"[sample % 2] for sample in ROUTED}), atol=1e-6
    )
    with pytest.raises(ValueError, match="needs the task of every sample, and no space owns 60, 61"):
        aggregate_latent_spaces(sets, ANCHORS, routing="oracle")


def test_average_asks_nobody(sets):
    found = aggregate_latent_spaces(sets, ANCHORS)
    np.testing.assert_allclose(found.embeddings, aggregate(as_dicts(sets), ANCHORS)[1], atol=1e-6)


def test_a_callable_gets_each_space_s_own_samples(sets):
    seen = []

    def prefer_b(own):
        seen.append((own.task, own.ids.tolist()))
        return lambda rows: torch.full((len(rows),), float(own.task == "b"))

    found = aggregate_latent_spaces(sets, ANCHORS, routing=prefer_b)
    assert seen == [("a", list(range(8, 34))), ("b", list(range(30, 60)))]
    np.testing.assert_allclose(found.embeddings, expected(sets, dict.fromkeys(ROUTED, "b")), atol=1e-6)


def test_a_sample_that_one_space_knows_goes_there(sets):
    partial = [sets[0].drop([70]), sets[1]]
    found = aggregate_latent_spaces(partial, ANCHORS, routing=lambda own: lambda rows: -rows.norm(dim=1))
    assert found.sources[found.positions([70])].tolist() == [[False, True]]


def test_mahalanobis_without_labels_has_one_mean(sets):
    bare = EmbeddingSet("a", range(30), torch.randn(30, 3))
    score = ROUTERS["mahalanobis"](bare)
    rows = bare.embeddings.double().numpy()
    covariance = LedoitWolf(assume_centered=True).fit(rows - rows.mean(0)).covariance_
    np.testing.assert_allclose(score(bare.embeddings), -mahalanobis(rows, rows, np.zeros(30), covariance), rtol=1e-6)


def test_bad_input_is_one_sentence(sets):
    bare = dataclasses.replace(sets[1], own=None)
    for routing in ("knn", "oracle", lambda own: None):
        with pytest.raises(ValueError, match="the space 'b' marks none; give EmbeddingSet"):
            aggregate_latent_spaces([sets[0], bare], ANCHORS, routing=routing)
    with pytest.raises(ValueError, match="needs labels of two or more classes on all own rows of the space 'a'"):
        aggregate_latent_spaces([dataclasses.replace(s, labels=None) for s in sets], ANCHORS, routing="confidence")
    with pytest.raises(ValueError, match=r"scores of shape \(2,\) for 30 rows of the space 'a'"):
        aggregate_latent_spaces(sets, ANCHORS, routing=lambda own: lambda rows: rows[0, :2])
    same = EmbeddingSet("a", range(5), torch.ones(5, 3))
    with pytest.raises(ValueError, match="the space 'a' has no spread around its class means"):
        ROUTERS["mahalanobis"](same)
