from __future__ import annotations

import pytest
import torch

from hf_atm.merging import merge_buffers

from .testing_utils import assert_same


def statistics(data, batches):
    return {
        "bn.running_mean": data.mean(0),
        "bn.running_var": data.var(0, unbiased=False),
        "bn.num_batches_tracked": torch.tensor(batches),
        "position_ids": torch.arange(3) + batches,
        "mask": torch.tensor([batches > 2]),
        "temperature": torch.tensor(float(batches)),
    }


def test_pooled_statistics_are_those_of_the_joined_data():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 4, generator=generator) * 2 + shift for n, shift in ((10, 0.0), (30, 5.0))]
    buffers = [statistics(parts[0], 2), statistics(parts[1], 7)]
    base = statistics(torch.ones(3, 4), 1)
    merged = merge_buffers(buffers, base, weights=[10, 30])
    joined = torch.cat(parts)
    torch.testing.assert_close(merged["bn.running_mean"], joined.mean(0))
    torch.testing.assert_close(merged["bn.running_var"], joined.var(0, unbiased=False))
    assert merged["bn.num_batches_tracked"].item() == 7
    assert merged["position_ids"].tolist() == [1, 2, 3] and merged["position_ids"].dtype == torch.int64
    assert merged["mask"].tolist() == [False]
    assert merged["temperature"].item() == (2 * 10 + 7 * 30) / 40
    assert list(merged) == list(base)


def test_golden_pool_and_top_level_names():
    left = {"running_mean": torch.tensor([0.0]), "running_var": torch.tensor([1.0])}
    right = {"running_mean": torch.tensor([4.0]), "running_var": torch.tensor([3.0])}
    merged = merge_buffers([left, right], left)
    # mean(var + mu^2) - mean(mu)^2 = (1 + 3 + 16) / 2 - 4
    assert merged["running_mean"].item() == 2.0 and merged["running_var"].item() == 6.0


def test_variance_survives_large_means_and_odd_weights():
    one = {"running_mean": torch.tensor([1e6]), "running_var": torch.tensor([1e-3])}
    for weights in ([1, 1], [0.3, -0.7], [0, 0], [1, -1]):
        merged = merge_buffers([one, one], one, weights)
        torch.testing.assert_close(merged["running_var"], one["running_var"])
        torch.testing.assert_close(merged["running_mean"], one["running_mean"])


def test_order_copies_and_errors():
    generator = torch.Generator().manual_seed(1)
    buffers = [statistics(torch.randn(9, 4, generator=generator), n) for n in (1, 2, 3)]
    base, weights = statistics(torch.zeros(3, 4), 0), [0.3, 0.1, 0.7]
    assert_same(merge_buffers(buffers, base, weights), merge_buffers(buffers[::-1], base, weights[::-1]))
    doubles = [{"scale": torch.randn(500, generator=generator, dtype=torch.float64)} for _ in range(5)]
    assert_same(merge_buffers(doubles, doubles[0]), merge_buffers(doubles[::-1], doubles[0]))
    assert_same(merge_buffers(buffers[:1], buffers[0]), buffers[0])
    untouched = merge_buffers([], base)
    assert_same(untouched, base)
    untouched["position_ids"].add_(1)
    assert base["position_ids"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="temperature"):
        merge_buffers([{key: value for key, value in base.items() if key != "temperature"}], base)
    with pytest.raises(ValueError, match="1 weights for 3"):
        merge_buffers(buffers, base, [1])
