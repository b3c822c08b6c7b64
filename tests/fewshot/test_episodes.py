"""Episodes: pure functions of (seed, epoch, index), disjoint, from the chosen classes alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_atm.fewshot import EpisodeCollator, EpisodeSampler, check_class_split


LABELS = np.repeat([3, 1, 4, 7, 5], [12, 11, 13, 12, 20])


def sampler(**changes):
    settings = {"n_way": 3, "k_shot": 4, "n_query": 5, "num_episodes": 40, "seed": 1}
    return EpisodeSampler(LABELS, **{**settings, **changes})


def same(first, second):
    return all(
        a.classes == b.classes and np.array_equal(a.support, b.support) and np.array_equal(a.query, b.query)
        for a, b in zip(first, second, strict=True)
    )


def test_support_and_query_are_disjoint_and_of_their_class():
    for episode in sampler():
        assert episode.support.shape == (3, 4) and episode.query.shape == (3, 5)
        rows = np.concatenate([episode.support, episode.query], 1)
        assert len(np.unique(rows)) == rows.size
        assert list(episode.classes) == sorted(set(episode.classes))
        assert (LABELS[rows] == np.array(episode.classes)[:, None]).all()


def test_no_novel_class_enters_episodes_of_base_classes():
    base = [1, 4, 5]
    seen = {label for episode in sampler(classes=base) for label in episode.classes}
    assert seen == set(base)
    assert {label for episode in sampler() for label in episode.classes} == set(LABELS.tolist())


def test_an_episode_follows_from_seed_epoch_and_index_alone():
    first, second = sampler(), sampler()
    forward, backward = list(first), [second[i] for i in reversed(range(40))][::-1]
    assert same(forward, backward)
    assert same(forward, list(pickle.loads(pickle.dumps(first))))
    assert not same(forward, list(sampler(seed=2)))
    first.set_epoch(1)
    later = list(first)
    assert not any(same([a], [b]) for a, b in zip(forward, later, strict=True))
    first.set_epoch(0)
    assert same(forward, list(first))
    # Fewer episodes are the first of many.
    assert same(forward[:10], list(sampler(num_episodes=10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_batches(workers):
    items = [torch.tensor([float(i)]) for i in range(len(LABELS))]
    data = sampler(num_episodes=6)
    data.set_epoch(3)
    loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=EpisodeCollator(_stack, items))
    batches = list(loader)
    assert len(batches) == 3
    for start, batch in zip((0, 2, 4), batches, strict=True):
        rows = batch["items"]["x"].squeeze(1)[batch["index"]].long().numpy()
        for offset in range(2):
            episode = data[start + offset]
            assert np.array_equal(rows[offset, :, :4], episode.support)
            assert np.array_equal(rows[offset, :, 4:], episode.query)
    assert batch["k_shot"] == 4


def _stack(items):
    return {"x": torch.stack(items)}


def test_every_sample_of_a_class_is_drawn_equally_often():
    counts = np.zeros(len(LABELS))
    for episode in sampler(num_episodes=4000, n_way=5):
        counts[episode.support] += 1
    share = counts / 4000
    expected = 4 / np.array([(LABELS == label).sum() for label in LABELS])
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / 4000)


def test_the_collator_reads_each_sample_once():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    items = Counting(torch.tensor([float(i)]) for i in range(len(LABELS)))
    data = sampler(num_episodes=30, classes=[1, 4, 3])
    batch = EpisodeCollator(_stack, items)(list(data))
    rows = {int(row) for e in data for row in np.concatenate([e.support, e.query], 1).ravel()}
    assert Counting.reads == len(rows) == len(batch["items"]["x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_way": 6}, "episodes of 6 classes need 6 of them, and there are 5"),
        ({"classes": [1, 4]}, "episodes of 3 classes need 3 of them, and there are 2"),
        ({"k_shot": 7}, "class 1 has 11 samples, and an episode takes 7 \\+ 5 of each class"),
        ({"k_shot": 0}, "k_shot is 0"),
        ({"n_way": 1}, "n_way is 1"),
        ({"n_query": 0}, "n_query is 0"),
        ({"num_episodes": 0}, "num_episodes is 0"),
        ({"classes": [1, 4, 9]}, "class 9 has no samples"),
        ({"classes": [1, 4, 4]}, "classes names 4 twice"),
        ({"class_names": {1: "bee"}, "k_shot": 7}, "class 'bee' has 11 samples"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        sampler(**changes)
    assert "\n" not in str(error.value)


def test_labels_must_be_whole_numbers():
    for labels in ([0.5, 1.0], [[0, 1]], []):
        with pytest.raises(ValueError, match="labels"):
            EpisodeSampler(labels, 2, 1, 1, 1)


def test_an_index_outside_is_an_index_error():
    with pytest.raises(IndexError, match="episode 40 of 40"):
        sampler()[40]


def test_overlapping_class_splits_are_refused():
    check_class_split([0, 1], [2])
    with pytest.raises(ValueError, match=r"classes 1, 2 are both base and novel"):
        check_class_split([0, 1, 2], [2, 1])
