from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.merging.elementwise import chunks
from hf_atm.merging.elementwise.selection import kth_by_histogram, kth_largest, sample_step
from hf_atm.merging.elementwise.trimming import find_cuts, kept_count
from hf_atm.merging.tensors import Task

from . import reference, reference_elementwise


def normal(count, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(dtype)


def tied(count):
    """Magnitudes of rounded differences: a few thousand different ones, each many times, as in bfloat16 models."""
    base = torch.randn(count, generator=torch.Generator().manual_seed(1)) * 0.02
    moved = base + 1e-3 * torch.randn(count, generator=torch.Generator().manual_seed(2))
    return (moved.bfloat16().float() - base.bfloat16().float()).abs().numpy()


NUMBERS = {
    "normal": normal(20_000),
    "float64": normal(20_000, np.float64),
    "tied": tied(20_000),
    "few values": np.repeat(np.float32([0.5, -1.0, 2.0, 0.0]), 5_000),
    "constant": np.full(20_000, np.float32(3.0)),
    "sorted": np.sort(normal(20_000)),
    "tiny": np.float32([1e-45, -1e-45, 0.0, -0.0] * 5_000),
    "one": np.float32([7.0]),
}


def pieces(numbers):
    return [numbers[start : start + 3_000] for start in range(0, numbers.size, 3_000)]


@pytest.mark.parametrize("name", NUMBERS)
def test_kth_largest_equals_sorting(name):
    numbers = NUMBERS[name]
    ks = sorted({1, min(2, numbers.size), max(1, numbers.size // 5), max(1, numbers.size * 9 // 10), numbers.size})
    sample = numbers[:: sample_step(numbers.size)]
    found = kth_largest([sample] * len(ks), lambda: ([p] * len(ks) for p in pieces(numbers)), numbers.size, ks)
    for k, rank in zip(ks, found, strict=True):
        value, places, equal = reference_elementwise.kth_largest(numbers, k)
        assert (rank.value, rank.places, sum(rank.equal)) == (value, places, equal)
        assert rank.equal == [int((piece == value).sum()) for piece in pieces(numbers)]
        assert kth_by_histogram(lambda: pieces(numbers), k, numbers.dtype) == rank


@pytest.mark.parametrize("sample", [[50.0] * 300, [-50.0] * 300, [0.0], []], ids=["above", "below", "one", "none"])
def test_a_sample_that_misleads_costs_time_only(sample):
    numbers = normal(5_000)
    (found,) = kth_largest([np.float32(sample)], lambda: ([p] for p in pieces(numbers)), 5_000, [1234])
    assert found[:2] == reference_elementwise.kth_largest(numbers, 1234)[:2]


def test_a_good_sample_gathers_little_and_reads_once():
    numbers = normal(1_000_000)
    reads = []
    sample = numbers[:: sample_step(numbers.size)]
    kth_largest([sample], lambda: (reads.append(p) or [p] for p in pieces(numbers)), numbers.size, [200_000])
    assert len(reads) == len(pieces(numbers))
    assert 5_000 < sample.size < 20_000


def test_asking_for_too_many_is_an_error():
    with pytest.raises(ValueError, match="258"):
        kth_by_histogram(lambda: pieces(normal(257)), 258, np.dtype(np.float32))


def test_counts_survive_float_products():
    assert int(0.29 * 100) == 28
    assert kept_count(0.29, 100) == 29 and kept_count(0.2, 7) == 1 and kept_count(1.0, 7) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values", [normal(9_000), tied(9_000), np.zeros(9_000, np.float32)], ids=["normal", "tied", "zero"]
)
def test_cuts_keep_exactly_so_many_and_the_first_of_equal_ones(values, dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 512)
    flat = torch.from_numpy(values).to(dtype)
    vectors = {"b": flat[:5_001].view(3, 1667), "a": flat[5_001:8_000], "c": flat[8_000:]}
    task = Task("t", 1.0, vectors)
    joined = np.concatenate([vectors[key].reshape(-1).numpy() for key in "abc"])
    counts = [0, 1, 1_800, 4_500, 8_999, 9_000]
    for count, cut in zip(counts, find_cuts(task, ["a", "b", "c"], counts), strict=True):
        kept = []
        for key in "abc":
            for start, stop in chunks.spans(vectors[key].numel()):
                kept.append(cut.apply(task.chunk(key, start, stop), key, start))
        expected = np.where(reference.keep_largest(joined, count), joined, 0)
        assert np.array_equal(torch.cat(kept).numpy(), expected), count


def test_a_float64_threshold_cuts_float32_tensors_exactly():
    # The threshold lies between two float32 numbers; rounding it either way would move one of them over it.
    step = float(np.nextafter(np.float32(1), np.float32(2)))
    between = (1 + step) / 2
    vectors = {"a": torch.tensor([1.0, step, 0.5]), "b": torch.tensor([between, 0.1], dtype=torch.float64)}
    task = Task("t", 1.0, vectors)
    (cut,) = find_cuts(task, ["a", "b"], [2])
    assert cut.apply(task.tensor("a"), "a", 0).tolist() == [0.0, step, 0.0]
    assert cut.apply(task.tensor("b"), "b", 0).tolist() == [between, 0.0]
    (cut,) = find_cuts(task, ["a", "b"], [3])
    assert cut.apply(task.tensor("a"), "a", 0).tolist() == [1.0, step, 0.0]
