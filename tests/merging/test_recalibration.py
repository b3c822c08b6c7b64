from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_atm.merging import merge_state_dicts, recalibrate_batch_norm


class Block(nn.Module):
    """A small residual network with BatchNorm, dropout and two ways through."""

    def __init__(self, channels=6):
        super().__init__()
        self.first = nn.Conv2d(2, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(channels, 3)

    def features(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return torch.relu(x + self.norm2(self.second(x)))

    def forward(self, x):
        return self.head(self.dropout(self.features(x).mean(dim=(2, 3))))


def images(count, seed=0):
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def recalibrate(model, batches, **kwargs):
    return recalibrate_batch_norm(model, batches, disable_tqdm=True, **kwargs)


def statistics(values):
    """Mean and unbiased variance per channel, over everything at once in float64."""
    flat = values.detach().double().transpose(0, 1).flatten(1)
    return flat.mean(dim=1).float(), flat.var(dim=1).float()


@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [10, 13, 1]])
def test_statistics_are_those_of_all_data(sizes):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), images(24)
    assert recalibrate(model, data.split(sizes)) is model
    mean, variance = statistics(model[0](data))
    torch.testing.assert_close(model[1].running_mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model[1].running_var, variance, atol=1e-6, rtol=1e-6)
    assert model[1].num_batches_tracked.item() == len(sizes)


def test_deeper_layers_see_what_training_would_show_them():
    torch.manual_seed(0)
    model, data = Block(), images(16)
    seen = {}
    model.norm2.register_forward_pre_hook(lambda _, args: seen.update(values=args[0]))
    recalibrate(model, [data])
    torch.manual_seed(0)
    twin = Block().train()
    twin.norm2.register_forward_pre_hook(lambda _, args: seen.update(expected=args[0]))
    twin(data)
    torch.testing.assert_close(seen["values"], seen["expected"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.norm2.running_mean, statistics(seen["values"])[0], atol=1e-6, rtol=1e-6)


def test_large_offsets_do_not_cancel():
    data = images(20)[:, :, 0, 0] * 1e-3 + 1e4
    model = recalibrate(nn.BatchNorm1d(2), data.split(3))
    torch.testing.assert_close(model.running_var, statistics(data)[1], rtol=1e-6, atol=0)


def test_layers_used_twice_sequences_and_single_examples():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x, y):
            return self.norm(x), self.norm(y)

    x, y = images(5)[:, :, 0, :], images(5, seed=1)[:, :, 0, :] - 3
    model = recalibrate(Twice(), [{"x": x, "y": y}])
    mean, variance = statistics(torch.cat([x, y]))
    torch.testing.assert_close(model.norm.running_mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.norm.running_var, variance, atol=1e-5, rtol=0)
    # One value has no spread, and torch in training mode would refuse it.
    single = recalibrate(nn.BatchNorm1d(2), [torch.tensor([[3.0, -1.0]])])
    assert single.running_mean.tolist() == [3.0, -1.0] and single.running_var.tolist() == [0.0, 0.0]


def train(model, x, y, steps=40):
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def test_recalibration_beats_pooling():
    """Averaged weights shrink the activations; pooled statistics still expect those of the experts."""
    torch.manual_seed(0)
    x = images(256)
    y = (x.mean(dim=(2, 3)) @ torch.randn(2, 3)).argmax(dim=1)
    experts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        experts.append(train(Block(), x, y))

    def loss(model):
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model.eval()(x), y))

    merged = Block()
    merged.load_state_dict(merge_state_dicts(experts))
    pooled = loss(merged)
    gap = (merged.norm2.running_var / statistics(merged.second(torch.relu(merged.norm(merged.first(x)))))[1]).log()
    recalibrate(merged, x.split(64))
    left = (merged.norm2.running_var / statistics(merged.second(torch.relu(merged.norm(merged.first(x)))))[1]).log()
    assert float(left.abs().mean()) < 0.1 * float(gap.abs().mean())
    assert loss(merged) < pooled


def test_model_is_left_as_it_was_but_for_the_statistics():
    torch.manual_seed(0)
    model, data = Block().train(), images(6)
    model.norm.eval()
    model.norm.momentum = 0.3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    recalibrate(model, data.split(2), num_batches=2)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "running" in key or "tracked" in key}
    assert [module.training for module in model.modules()] == modes and model.norm.momentum == 0.3
    assert model.norm.num_batches_tracked.item() == 2
    assert not any(module._forward_pre_hooks for module in model.modules())
    mean, _ = statistics(model.first(data[:4]))
    torch.testing.assert_close(model.norm.running_mean, mean, atol=1e-6, rtol=0)


def test_errors_change_nothing():
    torch.manual_seed(0)
    model, data = Block().train(), images(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def broken():
        yield data
        raise OSError("disk")

    for batches, error in ((broken(), OSError), ([data, data[:, :1]], RuntimeError), ([], ValueError)):
        with pytest.raises(error):
            recalibrate(model, batches)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_further_inputs_and_layers_that_do_not_run():
    class Ways(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})

        def forward(self, x, task):
            return self.ways[task](x)

    model = recalibrate(Ways(), [(torch.ones(3, 2), torch.zeros(3))], inputs={"task": "b"})
    assert model.ways["b"].running_mean.tolist() == [1.0, 1.0]
    assert model.ways["a"].running_mean.tolist() == [0.0, 0.0] and model.ways["a"].num_batches_tracked.item() == 0


def test_bad_input():
    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="no BatchNorm layer") as error:
            recalibrate(model, [torch.ones(2, 2)])
        assert str(error.value).endswith(".")
    with pytest.raises(ValueError, match="no batch"):
        recalibrate(nn.BatchNorm1d(2), [])
    with pytest.raises(ValueError, match="num_batches=0"):
        recalibrate(nn.BatchNorm1d(2), [torch.ones(2, 2)], num_batches=0)
