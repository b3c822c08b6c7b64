"""The walk of the line search on known curves."""

from __future__ import annotations

import math

import pytest

from hf_atm.line_search import search_step


def parabola(best, scale=1.0):
    return lambda step: {"a": 1.0 + (math.log(step) - math.log(best)) ** 2, "b": scale}


@pytest.mark.parametrize(("best", "expected"), [(1.0, 1.0), (2.1, 2.0), (0.24, 0.25), (100.0, 4.0), (0.001, 0.25)])
def test_finds_the_nearest_step_of_its_grid(best, expected):
    step, tried = search_step(parabola(best), 1.0)
    assert step == pytest.approx(expected)
    assert tried[step] == min(tried.values()) and tried[1.0] == 1.0
    assert len(tried) <= 6


def test_units_of_a_task_do_not_decide():
    def losses(step):
        return {"large": 1000 * (2 + math.log(step)), "small": 0.001 * (1 + (math.log(step / 4)) ** 2)}

    step, _ = search_step(losses, 1.0)
    assert step > 1.0


def test_steps_that_diverge_are_left_behind():
    def losses(step):
        return {"a": math.nan if step > 0.6 else 1 + step}

    step, tried = search_step(losses, 1.0)
    assert step < 0.6 and tried[1.0] == math.inf


def test_a_search_that_never_gets_better_keeps_the_start():
    step, tried = search_step(lambda step: {"a": 1.0}, 2.5)
    assert step == 2.5 and len(tried) == 3
