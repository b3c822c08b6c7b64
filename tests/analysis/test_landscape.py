"""Losses between models, on a quadratic whose values are known everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_atm.analysis import Plane, barrier_height, loss_landscape, loss_line
from tests.testing_utils import TinyModel, largest_difference, parameters_of


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = nn.Parameter(torch.tensor([[0.5]]))

    def loss(self):
        return float((self.a.detach().square() * torch.tensor([1.0, 3.0])).sum() + 2 * self.b.detach().square().sum())


def state(*values):
    return {"a": torch.tensor(values[:2], dtype=torch.float32), "b": torch.tensor([[values[2]]], dtype=torch.float32)}


def loss_at(values):
    a, b, c = values
    return a * a + 3 * b * b + 2 * c * c


MODELS = ((0.0, 0.0, 1.0), (2.0, 0.0, 1.0), (1.0, 3.0, 1.0))


def test_a_line_and_its_barrier():
    model = Quadratic()
    before = parameters_of(model)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = loss_line(model, state(*MODELS[0]), state(*MODELS[2]), model.loss, shares)
    assert losses == pytest.approx([loss_at((s, 3 * s, 1)) for s in shares])
    assert barrier_height(losses) == 0.0
    assert barrier_height([1.0, 5.0, 2.0]) == pytest.approx(3.5)
    assert largest_difference(parameters_of(model), before) == 0.0


def test_a_plane_keeps_distances():
    plane = Plane.through(*(state(*values) for values in MODELS))
    assert sum(plane.corners, ()) == pytest.approx((0, 0, 2, 0, 1, 3))
    for (x, y), values in zip(plane.corners, MODELS, strict=True):
        point = plane.point(x, y)
        assert largest_difference(point, state(*values)) < 1e-6
        assert plane.project(state(*values)) == pytest.approx((x, y, 0.0), abs=1e-6)
    # Straight above a point of the plane.
    assert plane.project(state(0.5, 1.5, 4.0)) == pytest.approx((0.5, 1.5, 3.0), abs=1e-6)


def test_planes_of_random_models_are_isometric():
    generator = torch.Generator().manual_seed(0)
    models = [
        {n: torch.randn(p.shape, generator=generator) for n, p in TinyModel().named_parameters()} for _ in range(4)
    ]
    plane = Plane.through(*models[:3])

    def distance(first, second):
        return sum(float((first[n].double() - second[n].double()).square().sum()) for n in first) ** 0.5

    for i in range(3):
        for j in range(i):
            (a, b), (c, d) = plane.corners[i], plane.corners[j]
            assert ((a - c) ** 2 + (b - d) ** 2) ** 0.5 == pytest.approx(distance(models[i], models[j]), rel=1e-9)
    x, y, height = plane.project(models[3])
    assert distance(models[3], plane.point(x, y)) == pytest.approx(height, rel=1e-5)
    assert distance(models[3], plane.point(x + 1, y)) > height


def test_a_landscape():
    model = Quadratic()
    before, calls = parameters_of(model), []
    plane = Plane.through(*(state(*values) for values in MODELS))
    path = [state(0.5, 0.5, 1.0), state(5.0, 0.0, 1.5)]
    result = loss_landscape(model, plane, model.loss, 5, 0.1, path, lambda: calls.append(1))
    assert result.corner_losses == pytest.approx([loss_at(values) for values in MODELS], abs=1e-6)
    for y, row in zip(result.y, result.losses, strict=True):
        assert row == pytest.approx([loss_at((x, y, 1)) for x in result.x], rel=1e-5)
    assert (result.x[0], result.x[-1]) == pytest.approx((-0.5, 5.5)) and (result.y[0], result.y[-1]) == pytest.approx(
        (-0.3, 3.3)
    )
    assert result.path[1] == pytest.approx((5.0, 0.0, 0.5), abs=1e-6) and len(calls) == 28
    assert largest_difference(parameters_of(model), before) == 0.0


def test_corners_are_the_models_themselves():
    """Of a real net in float32: its own loss, to the bit."""
    generator = torch.Generator().manual_seed(1)
    models = [TinyModel() for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    features, labels = torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)

    def loss(model):
        with torch.no_grad():
            return float(model(features, labels, task="colour").loss)

    probe = TinyModel()
    plane = Plane.through(*(dict(model.state_dict()) for model in models))
    result = loss_landscape(probe, plane, lambda: loss(probe), 2)
    assert result.corner_losses == [loss(model) for model in models]


def test_bad_input():
    model = Quadratic()
    with pytest.raises(ValueError, match="lie on one line"):
        Plane.through(state(0, 0, 0), state(1, 1, 1), state(2, 2, 2))
    with pytest.raises(ValueError, match="lie on one line"):
        Plane.through(state(0, 0, 0), state(0, 0, 0), state(2, 2, 2))
    with pytest.raises(ValueError, match="differ in names or shapes of 'a'"):
        Plane.through(state(0, 0, 0), state(1, 0, 0), {**state(0, 1, 0), "a": torch.ones(3)})
    with pytest.raises(ValueError, match="no parameters 'c'"):
        loss_line(model, {"c": torch.ones(1)}, {"c": torch.ones(1)}, model.loss, [0])
    plane = Plane.through(*(state(*values) for values in MODELS))
    with pytest.raises(ValueError, match="resolution is 1"):
        loss_landscape(model, plane, model.loss, 1)
