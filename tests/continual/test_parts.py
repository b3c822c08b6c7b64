"""Samples, penalties, stored vectors and figures of continual ATM, one by one."""

from __future__ import annotations

import datasets
import pytest
import torch

from hf_atm.continual import (
    Consolidation,
    ContinualSettings,
    ElasticWeightConsolidation,
    TaskVectorArchive,
    check_stages,
    replay_sample,
    transfer,
)
from hf_atm.continual.replay import check_replay, replay_size
from hf_atm.merging import merge_task_vectors


DATA = datasets.Dataset.from_dict({"x": list(range(100))})


@pytest.mark.parametrize(("replay", "size"), [(0, 0), (0.0, 0), (0.1, 10), (7, 7), (7.0, 7), (1.0, 100), (100, 100)])
def test_sizes_of_a_sample(replay, size):
    assert replay_size("a", 100, replay) == size
    sample = replay_sample("a", DATA, replay)
    assert (0 if sample is None else len(sample)) == size


def test_a_sample_depends_on_seed_and_task_alone():
    first, second = (replay_sample("a", DATA, 10, seed=1)["x"][:] for _ in range(2))
    assert first == second != replay_sample("a", DATA, 10, seed=2)["x"][:]
    assert first != replay_sample("b", DATA, 10, seed=1)["x"][:]


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (101, "replay=101 is more than the 100 examples of task 'a'"),
        (-1, "replay is -1"),
        (1.5, "replay is 1.5"),
        (True, "replay is True"),
        ("some", "replay is 'some'"),
    ],
)
def test_bad_samples(replay, message):
    with pytest.raises(ValueError, match=message):
        replay_sample("a", DATA, replay)


def test_a_replay_of_nothing_is_said_so():
    check_replay({"a": DATA}, 0)
    with pytest.raises(ValueError, match="replay=0.004 keeps none of the 100 examples of task 'a'"):
        check_replay({"a": DATA}, 0.004)


def test_the_pull_is_the_gradient_of_the_penalty():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(4, 3)
    importance = {"weight": torch.rand(3, 4, generator=generator), "bias": torch.rand(3, generator=generator)}
    anchor = {name: torch.randn(value.shape, generator=generator) for name, value in importance.items()}
    held = Consolidation(importance, anchor)
    features = torch.randn(5, 4, generator=generator)
    model(features).square().sum().backward()
    ElasticWeightConsolidation(model, held, 0.7).on_pre_optimizer_step(None, None, None)
    copy = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = torch.nn.functional.linear(features, copy["weight"], copy["bias"]).square().sum()
    penalty = sum((importance[name] * (copy[name] - anchor[name]) ** 2).sum() for name in copy) / 2
    (loss + 0.7 * penalty).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, copy[name].grad, atol=1e-5)


def test_importance_adds_up_and_survives_a_file(tmp_path):
    first = Consolidation({}, {}).extended({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    both = first.extended({"w": torch.full((2,), 3.0)}, {"w": torch.ones(2)})
    both.save(tmp_path / "held.safetensors")
    loaded = Consolidation.load(tmp_path / "held.safetensors")
    assert loaded.importance["w"].tolist() == [4.0, 4.0] and loaded.anchor["w"].tolist() == [1.0, 1.0]


def test_weights_that_are_gone_are_named():
    held = Consolidation({"gone": torch.ones(1)}, {"gone": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\['gone'\] are not in this model"):
        ElasticWeightConsolidation(torch.nn.Linear(1, 1), held, 1.0)


def test_an_archive_gives_back_what_fits_its_rank(tmp_path):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(40, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
    vectors = {"a": {"w": low, "b": torch.randn(5, generator=generator)}, "b": {"w": low.flip(0), "b": torch.ones(5)}}
    archive = TaskVectorArchive(tmp_path / "stored", ratio=0.1)
    for task, vector in vectors.items():
        assert archive.store(task, vector) < 4 * (40 * 30 + 5)
        assert torch.allclose(archive.load(task)["w"], vector["w"], atol=1e-4)
        assert torch.equal(archive.load(task)["b"], vector["b"])
    whole = merge_task_vectors([vectors["b"], vectors["a"]], "opcm", names=["b", "a"])
    assert torch.allclose(archive.merge(["b", "a"])["w"], whole["w"], atol=1e-3)
    exact = TaskVectorArchive(tmp_path / "whole", ratio=None)
    exact.store("a", vectors["a"])
    assert all(torch.equal(exact.load("a")[name], vectors["a"][name]) for name in vectors["a"])


def test_transfer_by_hand():
    scores = [{"a": 0.9}, {"a": 0.7, "b": 0.6}, {"a": 0.8, "b": 0.5, "c": 0.4}]
    figures = transfer(scores, [["a"], ["b"], ["c"]], {"b": 0.5, "c": 0.5})
    assert figures.average == pytest.approx((0.8 + 0.5 + 0.4) / 3)
    assert figures.backward == pytest.approx(((0.8 - 0.9) + (0.5 - 0.6)) / 2)
    assert figures.forgetting == pytest.approx((0.1 + 0.1) / 2)
    assert figures.forward == pytest.approx(((0.6 - 0.5) + (0.4 - 0.5)) / 2)
    partial = transfer([{"b": 0.5}, {"b": 0.4, "c": 0.2}], [["a", "b"], ["c"]])
    assert partial.backward == pytest.approx(-0.1) and partial.average == pytest.approx(0.3)
    alone = transfer(scores[:1], [["a"]])
    assert alone.backward is None and alone.forward is None and alone.forgetting is None


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["a"], ["b"]], "leaves out c"),
        ([["a", "b"], "c", "d"], "has the unknown d"),
        (["a", "b", "c", "a"], "repeats a"),
        (["a", [], ["b", "c"]], "has an empty stage"),
        ("abc", "must be a list of stages"),
        ({"a": "b"}, "must be a list of stages"),
        ([1, "a"], "stage 1 .* must be a task's name or a list of names"),
        ([["a", 1], "b"], "stage 1 .* must be a task's name or a list of names"),
        ([], "must be a list of stages"),
    ],
)
def test_bad_schedules(stages, message):
    with pytest.raises(ValueError, match=message):
        check_stages(stages, ["a", "b", "c"])


def test_stages_may_be_single_names():
    assert check_stages(["a", ["b", "c"]], ["a", "b", "c"]) == [["a"], ["b", "c"]]


def test_numbers_that_yaml_takes_for_text():
    assert ContinualSettings.parse({"ewc": "1e-3", "replay": "1e-1"}) == ContinualSettings(ewc=1e-3, replay=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reply": 3}, "unknown key 'reply'; known: method, replay"),
        ({"method": "gem"}, "continual.method is 'gem'; choose one of atm, opcm"),
        ({"replay": -0.5}, "replay is -0.5"),
        ({"replay": "x"}, "replay is 'x'"),
        ({"replay": float("inf")}, "replay is inf"),
        ({"ewc": -1}, "continual.ewc is -1"),
        ({"ewc": "strong"}, "continual.ewc is 'strong'"),
        ({"ewc": float("inf")}, "continual.ewc is inf"),
        ({"ewc": True}, "continual.ewc is True"),
        ({"fisher_examples": True}, "continual.fisher_examples is True"),
        ({"method": "opcm", "merge_kwargs": [1]}, r"continual.merge_kwargs is \[1\]"),
        ({"references": "x"}, "continual.references is 'x'"),
        ({"compression": "x"}, "continual.compression is 'x'"),
        ({"fisher_examples": 0}, "continual.fisher_examples is 0"),
        ({"compression": 1.5}, "continual.compression is 1.5"),
        ({"method": "opcm", "ewc": 1.0}, "OPCM tunes every task from the start"),
        ({"merge_kwargs": {"alpha": 0.5}}, "merge_kwargs are those of OPCM"),
        ({"method": "opcm", "merge_kwargs": {"alpha": 2.0}}, "alpha"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        ContinualSettings.parse(values)
