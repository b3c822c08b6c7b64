"""Repaired networks have the spread of their endpoints, unit by unit; barriers measured on the line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_atm import merge_state_dicts
from hf_atm.alignment import align, loss_barrier, mlp_spec, repair

from .networks import ResNet, images, mlp, one_group, shaken


def outputs_of(model, layer, data):
    """Outputs of a layer over all data, units last, in float64."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: seen.append(
            (output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output).detach().double()
        )
    )
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in seen])


def averaged(models):
    result = copy.deepcopy(models[0])
    result.load_state_dict(merge_state_dicts([dict(model.state_dict()) for model in models]))
    return result


@pytest.mark.parametrize("target", ["variance", "std"])
def test_means_and_spreads_are_those_of_the_endpoints(target):
    torch.manual_seed(0)
    ends = [mlp(8, 16, 12, 3) for _ in range(3)]
    data = [torch.randn(20, 8), torch.randn(13, 8)]
    merged = averaged(ends)
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    repaired = repair(merged, ends, data, target=target)
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())
    for layer in ("0", "2"):
        parts = [outputs_of(end, layer, data) for end in ends]
        found = outputs_of(repaired, layer, data)
        mean = torch.stack([part.mean(0) for part in parts]).mean(0)
        variances = torch.stack([part.var(0, unbiased=False) for part in parts])
        spread = variances.mean(0) if target == "variance" else variances.sqrt().mean(0) ** 2
        assert torch.allclose(found.mean(0), mean, atol=1e-5)
        assert torch.allclose(found.var(0, unbiased=False), spread, rtol=1e-4)
    # The predictions' own layer is left alone.
    assert torch.equal(repaired[4].weight, merged[4].weight)


def test_convolutions_get_the_bias_they_need():
    torch.manual_seed(0)
    ends = [shaken(ResNet(one_group, width=4, blocks=1), seed) for seed in range(2)]
    data = [images(8) for _ in range(2)]
    repaired = repair(averaged(ends), ends, data)
    for layer in ("conv1", "layer1.0.conv2", "layer3.0.shortcut.0"):
        parts = [outputs_of(end, layer, data) for end in ends]
        found = outputs_of(repaired, layer, data)
        assert torch.allclose(found.mean(0), torch.stack([part.mean(0) for part in parts]).mean(0), atol=1e-4)
        spread = torch.stack([part.var(0, unbiased=False) for part in parts]).mean(0)
        assert torch.allclose(found.var(0, unbiased=False), spread, rtol=1e-3)


@pytest.mark.parametrize("norm", [one_group, nn.BatchNorm2d])
def test_equal_endpoints_change_nothing(norm):
    torch.manual_seed(0)
    model = shaken(ResNet(norm, width=4, blocks=1))
    data = [images(8) for _ in range(3)]
    if norm is nn.BatchNorm2d:
        model = repair(model, [model], data)
    x = images(8)
    with torch.no_grad():
        assert torch.allclose(repair(model, [model, model], data)(x), model(x), atol=1e-4)


def test_masked_tokens_do_not_count():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    ends = [shaken(BertForSequenceClassification(config), seed) for seed in range(2)]
    layer = "bert.encoder.layer.0.intermediate.dense"
    ids = torch.randint(1, 20, (6, 5))
    mask = torch.ones_like(ids)
    short = {"input_ids": ids, "attention_mask": mask}
    padding = torch.zeros(6, 4, dtype=torch.long)
    long = {"input_ids": torch.cat([ids, padding + 3], 1), "attention_mask": torch.cat([mask, padding], 1)}
    first, second = (repair(averaged(ends), ends, [batch], layers=[layer]) for batch in (short, long))
    assert torch.allclose(first.get_submodule(layer).weight, second.get_submodule(layer).weight, atol=1e-5)
    assert not torch.allclose(first.get_submodule(layer).weight, averaged(ends).get_submodule(layer).weight, atol=1e-3)


def test_a_text_as_long_as_the_layers_are_wide():
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[0, 5:] = 0
    data = [{"input_ids": torch.randint(16, (4, 8)), "attention_mask": mask}]
    repaired = repair(model, [model], data)
    with torch.no_grad():
        assert torch.allclose(repaired(**data[0]).logits, model(**data[0]).logits, atol=1e-5)


def test_a_layer_that_runs_twice_is_measured_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.outer(self.inner(self.inner(x).relu()))

    torch.manual_seed(0)
    model, data = Twice(), [torch.randn(50, 6)]
    repaired = repair(model, [model, model], data)
    assert torch.allclose(repaired(data[0]), model(data[0]), atol=1e-5)


def test_barriers():
    torch.manual_seed(0)
    a = nn.Linear(2, 1)
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.weight.neg_()
    # The loss is -|w|^2 on the way, whose straight line is flat: its rise is |w|^2 in the middle.
    size = (a.weight.detach().double() ** 2).sum().item()
    assert loss_barrier(
        a, b, lambda model: -(model.weight.detach().double() ** 2).sum().item(), steps=5
    ) == pytest.approx(size)
    assert loss_barrier(a, a, lambda model: 1.0, steps=3) == 0
    with pytest.raises(ValueError, match="steps=2 leaves no model between"):
        loss_barrier(a, b, lambda model: 0.0, steps=2)
    with pytest.raises(ValueError, match="differ in names or shapes"):
        loss_barrier(a, nn.Linear(3, 1), lambda model: 0.0)


def test_alignment_lowers_the_barrier_of_trained_networks():
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def trained(seed):
        torch.manual_seed(seed)
        model = mlp(6, 64, 64, 2)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    def loss(model):
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x), y).item()

    a, b = trained(1), trained(2)
    found = align([a, b], mlp_spec(a))
    raw = loss_barrier(a, b, loss, steps=9)
    aligned = copy.deepcopy(a)
    aligned.load_state_dict(found.state_dicts[0])
    assert loss_barrier(aligned, found.state_dicts[1], loss, steps=9) < 0.5 * raw


def test_batches_may_come_from_an_iterator_or_in_another_order_every_time():
    torch.manual_seed(0)
    ends = [mlp(4, 6, 2) for _ in range(2)]
    rows = torch.randn(30, 4)
    fixed = repair(averaged(ends), ends, [rows[:20], rows[20:]])
    shuffled = torch.utils.data.DataLoader(rows, batch_size=7, shuffle=True)
    for data in (iter([rows[:20], rows[20:]]), shuffled):
        assert torch.allclose(repair(averaged(ends), ends, data)[0].weight, fixed[0].weight, atol=1e-5)
    some = repair(averaged(ends), ends, [rows[:20], rows[20:]], num_batches=1)
    assert torch.equal(some[0].weight, repair(averaged(ends), ends, [rows[:20]])[0].weight)


def test_bad_input():
    model = mlp(4, 6, 2)
    data = [torch.randn(5, 4)]
    for arguments, options, message in (
        ((model, [], data), {}, "endpoints must list"),
        ((model, [mlp(4, 7, 2)], data), {}, "An endpoint lacks"),
        ((model, [model], []), {}, "gave no batch"),
        ((model, [model], data), {"layers": ["9"]}, "layers names '9'"),
        ((model, [model], data), {"target": "median"}, "target='median' is unknown"),
        ((model, [model], data), {"num_batches": 0}, "num_batches=0"),
    ):
        with pytest.raises(ValueError, match=message):
            repair(*arguments, **options)
