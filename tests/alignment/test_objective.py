"""Objective, gradients, line search, oracle and ascent against dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.alignment import Flat, Heads, Permutation, PermutationSpec
from hf_atm.alignment.ascent import git_rebasin, match_model, merge_many, polish
from hf_atm.alignment.assignment import best_permutation, inner_product
from hf_atm.alignment.frank_wolfe import _blended, _line, best_step, climb, gradients, quartic, value_of
from hf_atm.alignment.mixture import Mixture
from hf_atm.alignment.problem import Problem, build_problem, objective
from hf_atm.alignment.starts import STARTS, starting_point
from hf_atm.alignment.workers import workers

from .reference import best_heads, matrix_of, pairwise_objective


# A group on one axis, on two different tensors, on both axes of one tensor, and with a spatial axis.
AXES = {"in": ("P", None), "conv": ("Q", "P", None), "square": ("Q", "Q"), "bias": ("Q",), "back": ("P", "Q")}
SHAPES = {"in": (6, 3), "conv": (5, 6, 2), "square": (5, 5), "bias": (5,), "back": (6, 5)}
SPEC = PermutationSpec({"P": Flat(6), "Q": Flat(5)}, AXES)
PAIRS = {name: (axes[0], axes[1] if len(axes) > 1 else None) for name, axes in AXES.items()}


def models(count, seed=0):
    draw = np.random.default_rng(seed)
    return [{name: draw.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(count)]


def problem_of(arrays):
    states = [{name: torch.from_numpy(array) for name, array in model.items()} for model in arrays]
    return build_problem(SPEC, states, SHAPES, None)


def soft_point(problem, seed=0):
    weights = [0.5, 0.3, 0.2]
    atoms = [
        [Permutation.random(SPEC, seed + 10 * number + model).vectors for model in range(problem.count)]
        for number in range(2)
    ]
    return Mixture(problem, [*zip(weights[:2], atoms, strict=True), (weights[2], [None] * problem.count)])


def dense(point):
    return [{name: point.dense(name, model) for name in point.problem.sizes} for model in range(point.problem.count)]


@pytest.fixture(autouse=True)
def pool():
    with workers() as pool:
        yield pool


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_objective_is_the_sum_over_pairs(count):
    arrays = models(count)
    problem = problem_of(arrays)
    orders = [Permutation.random(SPEC, seed).vectors for seed in range(count)]
    maps = [{name: matrix_of(vector) for name, vector in order.items()} for order in orders]
    assert objective(problem, orders) == pytest.approx(pairwise_objective(arrays, PAIRS, maps), rel=1e-12)


def test_the_objective_of_a_soft_point_is_the_sum_over_pairs():
    arrays = models(3)
    point = soft_point(problem_of(arrays))
    assert value_of(point) == pytest.approx(pairwise_objective(arrays, PAIRS, dense(point)), rel=1e-12)


def test_gradients_equal_finite_differences(pool):
    arrays = models(3)
    point = soft_point(problem_of(arrays))
    found = gradients(point, pool)
    maps = dense(point)
    step = 1e-5
    for model in range(3):
        for name, size in point.problem.sizes.items():
            for row, column in ((0, 0), (1, size - 1), (size - 1, 2)):
                values = []
                for sign in (1, -1):
                    maps[model][name][row, column] += sign * step
                    values.append(pairwise_objective(arrays, PAIRS, maps))
                    maps[model][name][row, column] -= sign * step
                assert found[model][name][row, column] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_the_quartic_is_the_objective_along_the_line(pool):
    arrays = models(3)
    point = soft_point(problem_of(arrays))
    start = dense(point)
    direction = [Permutation.random(SPEC, 100 + model).vectors for model in range(3)]
    stages, line = _line(point, direction, pool)
    for step in (0.0, 0.137, 0.5, 0.9, 1.0):
        maps = [
            {name: (1 - step) * own[name] + step * matrix_of(order[name]) for name in own}
            for own, order in zip(start, direction, strict=True)
        ]
        value = pairwise_objective(arrays, PAIRS, maps)
        assert np.polynomial.polynomial.polyval(step, line) == pytest.approx(value, rel=1e-11)
    point.advance(0.137, direction, _blended(stages, 0.137, pool), pool)
    maps = [
        {name: 0.863 * own[name] + 0.137 * matrix_of(order[name]) for name in own}
        for own, order in zip(start, direction, strict=True)
    ]
    assert value_of(point) == pytest.approx(pairwise_objective(arrays, PAIRS, maps), rel=1e-11)
    for model, wanted in enumerate(maps):
        for name, matrix in wanted.items():
            np.testing.assert_allclose(point.dense(name, model), matrix, atol=1e-14)


def test_the_slope_of_the_quartic_is_the_gap(pool):
    point = soft_point(problem_of(models(3)))
    direction = [Permutation.random(SPEC, 100 + model).vectors for model in range(3)]
    gap = sum(
        (scores[name] * (matrix_of(order[name]) - point.dense(name, model))).sum()
        for model, (scores, order) in enumerate(zip(gradients(point, pool), direction, strict=True))
        for name in scores
    )
    assert _line(point, direction, pool)[1][1] == pytest.approx(gap, rel=1e-10)


def test_the_best_step_is_the_best_of_many():
    draw = np.random.default_rng(0)
    for _ in range(50):
        line = quartic(draw.normal(size=(3, 3)))
        step, gain = best_step(line)
        grid = np.polynomial.polynomial.polyval(np.linspace(0, 1, 2001), line) - line[0]
        assert gain >= grid.max() - 1e-9
        assert np.polynomial.polynomial.polyval(step, line) - line[0] == pytest.approx(gain, abs=1e-12)


@pytest.mark.parametrize("start", STARTS)
def test_the_objective_never_falls(start, pool):
    problem = problem_of(models(4))
    point = starting_point(problem, start, 0, 0)
    values = climb(point, pool).values
    assert all(later >= earlier - 1e-9 for earlier, later in zip(values, values[1:], strict=False))
    rounded = point.rounded(pool)
    _, gains = polish(problem, rounded, pool)
    values = [objective(problem, rounded), *gains]
    assert all(later > earlier for earlier, later in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("method", [git_rebasin, merge_many])
def test_baselines_end_where_no_single_group_can_be_improved(method, pool):
    problem = problem_of(models(3))
    vectors, values = method(problem, pool, 0)
    assert values[-1] == pytest.approx(objective(problem, vectors))
    start = objective(problem, [problem.identity()] * 3)
    assert values[-1] > start
    if method is merge_many:
        assert polish(problem, vectors, pool)[1] == []


@pytest.mark.parametrize("qk_inner", [True, False])
def test_the_oracle_for_heads_is_exact(qk_inner):
    draw = np.random.default_rng(1)
    group = Heads(3, 1, 3, qk_inner=qk_inner)
    for _ in range(5):
        scores = {"A:qk": draw.normal(size=(9, 9)), "A:v": draw.normal(size=(9, 9))}
        vectors, value = best_permutation("A", group, scores)
        assert value == pytest.approx(best_heads(scores["A:qk"], scores["A:v"], 3, 3, qk_inner), rel=1e-12)
        assert sum(inner_product(scores[name], vectors[name]) for name in scores) == pytest.approx(value, rel=1e-12)
        assert all(sorted(vector) == list(range(9)) for vector in vectors.values())


def test_query_heads_move_with_their_key_value_head():
    spec = PermutationSpec({"A": Heads(2, 3, 2)}, {"q": ("A:q",), "k": ("A:k",), "o": ("A:o",)})
    order = Permutation(spec, {"A:qk": np.array([3, 2, 0, 1]), "A:v": np.array([2, 3, 1, 0])})
    moved = order.apply({"q": torch.arange(12.0), "k": torch.arange(4.0), "o": torch.arange(12.0)})
    assert moved["k"].tolist() == [3, 2, 0, 1]
    assert moved["q"].tolist() == [7, 6, 9, 8, 11, 10, 0, 1, 2, 3, 4, 5]
    assert moved["o"].tolist() == [6, 7, 8, 9, 10, 11, 1, 0, 3, 2, 5, 4]


def test_the_barycentre_is_the_mean_of_all_admissible_permutations():
    spec = PermutationSpec({"A": Heads(2, 1, 2, qk_inner=False)}, {"w": ("A:k", "A:o")})
    problem = build_problem(spec, [{"w": torch.eye(4).double()}] * 2, ["w"], None)
    point = Mixture(problem, [(1.0, [None, None])])
    fixed = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]) / 2
    np.testing.assert_allclose(point.dense("A:qk", 0), fixed)
    np.testing.assert_allclose(point.dense("A:v", 0), np.full((4, 4), 0.25))
    np.testing.assert_allclose(point.seen[0][0][..., 0].numpy(), fixed.T @ np.full((4, 4), 0.25))


def test_groups_matched_at_once_share_no_tensor_and_keep_their_order():
    axes = {f"{index}.weight": (f"P.{index + 1}", f"P.{index}") for index in range(4)}
    spec = PermutationSpec({f"P.{index}": Flat(3) for index in range(5)}, axes)
    problem = build_problem(spec, [{name: torch.eye(3).double() for name in axes}] * 2, axes, None)
    assert problem.together(["P.0", "P.2", "P.4", "P.1", "P.3"]) == [["P.0", "P.2", "P.4"], ["P.1", "P.3"]]
    assert problem.together(sorted(spec.groups)) == [[name] for name in sorted(spec.groups)]


def test_matching_groups_at_once_is_matching_them_one_by_one(pool, monkeypatch):
    axes = {f"{index}.weight": (f"P.{index + 1}", f"P.{index}") for index in range(4)}
    spec = PermutationSpec({f"P.{index}": Flat(8) for index in range(5)}, axes)
    states = [{name: torch.from_numpy(array) for name, array in chain(seed).items()} for seed in range(2)]
    problem = build_problem(spec, states, axes, None)
    targets = [block.matrices[0] for block in problem.blocks]
    sweeps = [["P.0", "P.2", "P.4", "P.1", "P.3"], ["P.3", "P.0", "P.1", "P.4", "P.2"]]
    at_once, changed = match_model(problem, 1, problem.identity(), targets, sweeps, pool)
    monkeypatch.setattr(Problem, "together", lambda problem, order: [[name] for name in order])
    one_by_one, _ = match_model(problem, 1, problem.identity(), targets, sweeps, pool)
    assert changed and all(np.array_equal(vector, one_by_one[name]) for name, vector in at_once.items())


def chain(seed):
    draw = np.random.default_rng(seed)
    return {f"{index}.weight": draw.normal(size=(8, 8)) for index in range(4)}
