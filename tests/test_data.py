from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from hf_atm.data import RoundDataset, TaskCollator, TaskDataset, TaskExample, segment_length
from hf_atm.schedule import RoundPlan
from hf_atm.seeding import derive_seed, isolated_rng


PLAN = RoundPlan(("a", "b"), (3, 2), 2)
ROWS = {"a": [("a", i) for i in range(8)], "b": [("b", i) for i in range(5)]}


def read(dataset, round_index=0):
    dataset.set_epoch(round_index)
    return [example.features for example in dataset.__getitems__(list(range(len(dataset))))]


def test_a_round_is_one_block_per_task_and_covers_its_epochs():
    rows = read(RoundDataset(ROWS, PLAN, 4, seed=0))
    assert [task for task, _ in rows] == ["a"] * 12 + ["b"] * 8
    # Twelve examples of eight: one whole epoch, and half of the next.
    assert sorted(rows[:8]) == ROWS["a"] and len(set(rows[8:12])) == 4
    assert sorted(rows[12:17]) == ROWS["b"] and len(set(rows[17:])) == 3


def test_orders_differ_by_round_epoch_and_seed_and_repeat_otherwise():
    dataset = RoundDataset(ROWS, RoundPlan(("a",), (4,), 2), 4, seed=0)
    first = read(dataset)
    assert first[:8] != first[8:] != read(dataset, 1)[:8]
    assert first == read(RoundDataset(ROWS, RoundPlan(("a",), (4,), 2), 4, seed=0))
    assert first != read(RoundDataset(ROWS, RoundPlan(("a",), (4,), 2), 4, seed=1))


def test_stored_order_without_shuffling():
    rows = read(RoundDataset(ROWS, PLAN, 4, seed=0, shuffle=False), 1)
    assert rows[:12] == ROWS["a"] + ROWS["a"][:4]


def test_a_tasks_order_does_not_depend_on_its_neighbours():
    alone = RoundDataset(ROWS, RoundPlan(("b",), (2,), 1), 4, seed=0)
    beside = RoundDataset(ROWS, PLAN, 4, seed=0)
    assert read(alone) == read(beside)[12:]


def test_orders_do_not_depend_on_the_hash_seed():
    code = (
        "from hf_atm.data import RoundDataset; from hf_atm.schedule import RoundPlan\n"
        "d = RoundDataset({'a': list(range(9))}, RoundPlan(('a',), (3,), 1), 3, seed=0)\n"
        "print([e.features for e in d.__getitems__(list(range(9)))])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": s},
        ).stdout
        for s in ("0", "1")
    }
    assert len(outputs) == 1


def test_survives_pickling_for_workers():
    import pickle

    dataset = RoundDataset(ROWS, PLAN, 4, seed=0)
    assert read(pickle.loads(pickle.dumps(dataset))) == read(dataset)


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_rows_follow_from_their_place_alone():
    plan = RoundPlan(("n",), (2,), 2)
    dataset = RoundDataset({"n": Noisy()}, plan, 4, seed=0)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = (random.getstate(), torch.random.get_rng_state())
    first = read(dataset)
    assert random.getstate() == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
    torch.manual_seed(2)
    assert read(dataset) == first
    by_row = Counter(row[0] for row in first)
    assert set(by_row.values()) == {2} and len({row[1:] for row in first}) == 8


def test_isolated_rng_restores_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with pytest.raises(KeyError):
        with isolated_rng(5):
            torch.rand(7), np.random.rand(), random.random()
            raise KeyError
    assert torch.equal(torch.rand(2), expected)


def test_seeds_depend_on_every_part_and_fit_63_bits():
    seeds = {derive_seed(*parts) for parts in [(0, "a"), (0, "b"), (1, "a"), ("0a",), (0, "a", "")]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_collator_takes_one_task_at_a_time():
    collator = TaskCollator(list, {"a": len}, add_task=False, columns=None)
    a, b = TaskExample("a", 0, {"x": 1}), TaskExample("b", 0, {"x": 2})
    assert collator([a, a]) == 2 and collator([b]) == [{"x": 2}] and collator([{"x": 3}]) == [{"x": 3}]
    with pytest.raises(RuntimeError, match=r"mixes the tasks \['a', 'b'\]"):
        collator([a, b])


def test_the_collator_names_the_task_and_drops_what_the_model_does_not_take():
    collator = TaskCollator(lambda rows: {"rows": rows}, add_task=True, columns=["x"])
    assert collator([TaskExample("a", 0, {"x": 1, "y": 2})]) == {"rows": [{"x": 1}], "task": "a"}


def test_a_random_collator_draws_from_the_example():
    collator = TaskCollator(lambda rows: {"mask": float(torch.rand(()))}, add_task=False)
    dataset = TaskDataset([1, 2, 3], "a")
    first = [collator([example]) for example in dataset.__getitems__([0, 1, 2])]
    torch.manual_seed(9)
    assert [collator([dataset[index]]) for index in range(3)] == first
    assert len({batch["mask"] for batch in first}) == 3


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps", "drop", "length"),
    [
        (40, 8, 1.0, None, False, 5),
        (41, 8, 1.0, None, False, 6),
        (41, 8, 1.0, None, True, 5),
        (320, 32, 0.1, None, False, 1),
        (100, 8, 0.5, None, False, 7),
        (10, 8, 3.0, None, False, 4),
        (10, 8, 1.0, 7, False, 7),
    ],
)
def test_segment_lengths(examples, batch, epochs, steps, drop, length):
    assert segment_length("t", examples, batch, epochs, steps, drop) == length
