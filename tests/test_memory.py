"""What a round holds: two copies of the shared weights for the mean, whatever the number of tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_atm.outer import OuterOptimizer
from hf_atm.rounds import DivergenceError, RoundState
from hf_atm.spaces import WeightSpace


def make_round(method="mean", tasks=3, shape=(64, 64), **kwargs):
    parameters = {"b": nn.Parameter(torch.randn(shape)), "a": nn.Parameter(torch.randn(shape[0]))}
    names = [f"t{index}" for index in range(tasks)]
    outer = OuterOptimizer(**kwargs.pop("outer", {}))
    return parameters, RoundState(
        WeightSpace(parameters),
        names,
        dict.fromkeys(names, 1.0),
        method,
        kwargs.pop("merge_kwargs", {}),
        outer,
        **kwargs,
    )


def held(state):
    """Bytes of distinct storages that the state refers to."""
    tensors = [*state.base.values(), *state.sum.values(), *state.outer.velocity.values()]
    tensors += [tensor for vector in state.vectors.values() for tensor in vector.tensors.values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("method", "kwargs", "copies"),
    [("mean", {}, 2), ("task_arithmetic", {}, 2), ("ties", {"density": 0.2}, 6), ("mean", {"keep": True}, 6)],
)
def test_copies_of_the_shared_weights(method, kwargs, copies):
    keep = bool(kwargs.pop("keep", False))
    parameters, state = make_round(method, tasks=5, keep=keep, merge_kwargs=kwargs)
    state.open()
    for task in state.tasks:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter))
        state.capture(task)
        state.restore()
    assert held(state) == copies * 4 * sum(p.numel() for p in parameters.values())
    state.merge(0)
    assert held(state) == 4 * sum(p.numel() for p in parameters.values())


def test_a_vector_that_is_not_finite_is_refused_and_named():
    parameters, state = make_round()
    state.open()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        parameters["b"][3, 4] = float("nan")
    with pytest.raises(DivergenceError, match="'t1'.*NaN or infinity"):
        state.capture("t1")
    state.restore()
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_parameters_are_never_replaced():
    parameters, state = make_round(outer={"momentum": 0.5})
    pointers = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    for _ in range(2):
        state.open()
        for task in state.tasks:
            with torch.no_grad():
                parameters["a"].add_(1.0)
            state.capture(task)
            state.restore()
        state.merge(0)
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == pointers
