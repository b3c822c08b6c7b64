"""Losses between models: along a line, and over the plane that three of them span."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..merging.tensors import listed


State = Mapping[str, Tensor]
Loss = Callable[[], float]


@contextmanager
def weights_of(model: nn.Module, state: State) -> Iterator[None]:
    """The model with other values in the parameters that `state` names, for as long as the context lasts."""
    parameters = dict(model.named_parameters())
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise ValueError(f"The model has no parameters {listed(unknown)}.")
    held = {name: parameters[name].detach().clone() for name in state}
    try:
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in held.items():
                parameters[name].copy_(value)


def loss_line(model: nn.Module, start: State, end: State, loss: Loss, shares: Sequence[float]) -> list[float]:
    """
    Loss along the straight line between two models.

    Args:
        model (`nn.Module`):
            Takes the weights; it has its own again afterwards. Everything that the states do not name, such as heads
            and running statistics, stays as it is.
        start, end (`Mapping[str, Tensor]`):
            Parameters by name, the same ones.
        loss (`Callable[[], float]`):
            Loss of the model as it is.
        shares (`Sequence[float]`):
            Where to measure: 0 is the start, 1 the end.

    Returns:
        `list[float]`: one loss per share.
    """
    _check_alike([start, end])
    losses = []
    for share in shares:
        state = start if share == 0 else end if share == 1 else _combine([start, end], [1 - share, share])
        with weights_of(model, state):
            losses.append(float(loss()))
    return losses


def barrier_height(losses: Sequence[float]) -> float:
    """
    Linear-mode-connectivity barrier: how far losses on a line rise above the straight line between those of its ends.

    Args:
        losses (`Sequence[float]`):
            At least two, at equal distances.

    Returns:
        `float`: at least 0, which the ends themselves give.
    """
    last = len(losses) - 1
    chord = [(losses[0] * (last - index) + losses[-1] * index) / last for index in range(last + 1)]
    return max(value - below for value, below in zip(losses, chord, strict=True))


@dataclass(frozen=True)
class Plane:
    """
    The plane through three models, with orthonormal axes: distances in it are L2 distances between weights.

    Args:
        models (`tuple[State, State, State]`):
            The first is the origin; the second lies on the positive x axis, the third above it.
        corners (`list[tuple[float, float]]`):
            Where they lie.
    """

    models: tuple[State, State, State]
    corners: list[tuple[float, float]]

    @classmethod
    def through(cls, first: State, second: State, third: State) -> Plane:
        """
        Raises:
            `ValueError`: when the models differ in names or shapes, or lie on a line.
        """
        _check_alike([first, second, third])
        xx = xy = yy = 0.0
        for name in sorted(first):
            u, v = (model[name].double() - first[name].double() for model in (second, third))
            xx, xy, yy = xx + float((u * u).sum()), xy + float((u * v).sum()), yy + float((v * v).sum())
        height = yy - xy * xy / xx if xx else 0.0
        if height <= 1e-9 * yy:
            raise ValueError("The three models lie on one line and span no plane; choose another one of them.")
        width = xx**0.5
        return cls((first, second, third), [(0.0, 0.0), (width, 0.0), (xy / width, height**0.5)])

    def shares(self, x: float, y: float) -> tuple[float, float, float]:
        """The weights of the three models whose sum is a point of the plane; they add up to 1."""
        width, (slant, height) = self.corners[1][0], self.corners[2]
        third = y / height
        second = (x - third * slant) / width
        return 1 - second - third, second, third

    def point(self, x: float, y: float) -> dict[str, Tensor]:
        """The weights at a point of the plane, in the dtypes of the first model."""
        return _combine(self.models, self.shares(x, y))

    def project(self, state: State) -> tuple[float, float, float]:
        """Where another model's shadow falls on the plane: x, y, and how far the model is from it."""
        _check_alike([*self.models, state])
        first, second, third = self.models
        along_u = along_v = total = 0.0
        for name in sorted(first):
            origin = first[name].double()
            w = state[name].double() - origin
            along_u += float((w * (second[name].double() - origin)).sum())
            along_v += float((w * (third[name].double() - origin)).sum())
            total += float((w * w).sum())
        width, (slant, height) = self.corners[1][0], self.corners[2]
        x = along_u / width
        y = (along_v - slant * x) / height
        return x, y, max(0.0, total - x * x - y * y) ** 0.5


@dataclass(frozen=True)
class Landscape:
    """
    Losses over a plane.

    Args:
        x, y (`list[float]`):
            Places of columns and rows, in L2 distance.
        losses (`list[list[float]]`):
            Loss by row and column.
        corners (`list[tuple[float, float]]`), corner_losses (`list[float]`):
            The three models that span the plane, and their own losses.
        path (`list[tuple[float, float, float]]`):
            Further models: x, y and distance from the plane.
    """

    x: list[float]
    y: list[float]
    losses: list[list[float]]
    corners: list[tuple[float, float]]
    corner_losses: list[float]
    path: list[tuple[float, float, float]]


def loss_landscape(
    model: nn.Module,
    plane: Plane,
    loss: Loss,
    resolution: int = 15,
    margin: float = 0.25,
    path: Sequence[State] = (),
    report: Callable[[], None] = lambda: None,
) -> Landscape:
    """
    Measures the loss on a grid over a plane.

    Args:
        model (`nn.Module`):
            Takes the weights and has its own again afterwards, see [`loss_line`].
        plane ([`Plane`]):
            Through three models.
        loss (`Callable[[], float]`):
            Loss of the model as it is; called `resolution ** 2 + 3` times.
        resolution (`int`, *optional*, defaults to 15):
            Columns and rows, at least 2.
        margin (`float`, *optional*, defaults to 0.25):
            How far the grid reaches beyond the models, as a share of their extent.
        path (`Sequence[Mapping[str, Tensor]]`, *optional*):
            Further models, such as the merged ones of all rounds, to be projected onto the plane.
        report (`Callable[[], None]`, *optional*):
            Is called after every loss.

    Returns:
        [`Landscape`]

    Raises:
        `ValueError`: for a resolution below 2.
    """
    if resolution < 2:
        raise ValueError(f"resolution is {resolution}; a grid needs at least 2 columns and rows.")
    shadows = [plane.project(state) for state in path]
    xs = [place[0] for place in (*plane.corners, *shadows)]
    ys = [place[1] for place in (*plane.corners, *shadows)]
    columns, rows = (_grid(min(places), max(places), margin, resolution) for places in (xs, ys))

    def loss_of(state: State) -> float:
        with weights_of(model, state):
            value = float(loss())
        report()
        return value

    corner_losses = [loss_of(state) for state in plane.models]
    losses = [[loss_of(plane.point(x, y)) for x in columns] for y in rows]
    return Landscape(columns, rows, losses, list(plane.corners), corner_losses, shadows)


def _grid(low: float, high: float, margin: float, count: int) -> list[float]:
    low, high = low - margin * (high - low), high + margin * (high - low)
    return torch.linspace(low, high, count, dtype=torch.float64).tolist()


def _combine(states: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
    return {
        name: sum(
            (share * state[name].double() for state, share in zip(states, shares, strict=True)),
            torch.zeros_like(states[0][name], dtype=torch.float64),
        ).to(states[0][name].dtype)
        for name in states[0]
    }


def _check_alike(states: Sequence[State]) -> None:
    for state in states[1:]:
        different = sorted(set(states[0]).symmetric_difference(state))
        if not different:
            different = [name for name in sorted(state) if state[name].shape != states[0][name].shape]
        if different:
            raise ValueError(
                f"The models differ in names or shapes of {listed(different)}; compare models of one kind."
            )
