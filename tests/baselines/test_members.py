"""Who takes part, and with what budget."""

from __future__ import annotations

import pytest

from hf_atm.baselines.members import check_budgets, parse_members


COMMON = {"num_rounds": 10, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
TASKS = ["b", "a"]


def budgets(members, steps=20):
    return check_budgets(parse_members(members), TASKS, COMMON, steps)


def test_every_member_gets_the_same_number_of_steps():
    settings = budgets(
        {"joint": None, "atm": {}, "five": {"baseline": "atm", "num_rounds": 5}, "one_shot": {}, "diloco": {}}
    )
    sizes = {name: (values.get("num_rounds", 10), values["local_steps"]) for name, values in settings.items()}
    assert sizes == {"joint": (10, 2), "atm": (10, 2), "five": (5, 4), "one_shot": (1, 20), "diloco": (10, 2)}
    assert settings["diloco"]["outer_momentum"] == 0.9 and settings["one_shot"]["keep_task_vectors"]


def test_own_settings_win_over_the_baseline():
    settings = budgets({"mine": {"baseline": "diloco", "outer_momentum": 0.5}, "isoloco": {}})
    assert settings["mine"]["outer_momentum"] == 0.5 and settings["mine"]["outer_learning_rate"] == 0.7
    assert settings["isoloco"]["task_weights"] == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x": {"baseline": "atm", "num_rounds": 3}}, "x cannot share out 20 steps over 3 rounds"),
        ({"x": {"baseline": "atm", "num_rounds": 4, "local_steps": 4}}, "x takes 4 x 4 = 16 steps per task, not 20"),
        (
            {"x": {"baseline": "joint", "per_device_train_batch_size": 16}},
            "x has per_device_train_batch_size=16, not 8",
        ),
        (
            {
                "x": {"baseline": "atm", "num_rounds": 3},
                "y": {"baseline": "joint", "gradient_accumulation_steps": 2},
            },
            "x cannot share.*; y has gradient_accumulation_steps=2",
        ),
    ],
)
def test_members_that_differ_in_budget_are_refused(members, message):
    with pytest.raises(ValueError, match=f"The members differ in budget: .*{message}"):
        budgets(members)


def test_members_may_be_a_list_of_names():
    assert [member.baseline for member in parse_members(["joint", "atm"])] == ["joint", "atm"]


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({}, ValueError, "at least one method"),
        ({"sgd": {}}, KeyError, "no baseline 'sgd'.*joint"),
        ({"x": {"baseline": "adam"}}, KeyError, "no baseline 'adam'"),
        ({"atm": {"rounds": 3}}, ValueError, "unknown setting 'rounds'"),
        ({"atm": {"seed": 3}}, ValueError, "sets seed, which the comparison decides"),
        ({"atm": {"merges": ["mean"]}}, ValueError, "sets merges"),
        ({"one_shot": {"merges": ["swirl"]}}, KeyError, "no one-shot merge 'swirl'.*ties"),
        ({"one_shot": {"merges": 3}}, ValueError, "merges must be a list of names, not 3"),
        ({"joint": 3}, ValueError, "compare.members.joint must hold settings, not 3"),
        ({"atm": {"num_rounds": 0}}, ValueError, "compare.members.atm.num_rounds is 0"),
        ({"atm": {"num_rounds": None}}, ValueError, "compare.members.atm.num_rounds is None"),
        ({"experts": {"baseline": "atm"}}, ValueError, "what rows of one_shot are called"),
        ({"one_shot": {"head_steps": 2}}, ValueError, "sets head_steps, but a one-shot merge"),
        ({"one_shot": {"num_rounds": 2}}, ValueError, "a one-shot merge is one round of experts"),
    ],
)
def test_bad_members(members, error, message):
    with pytest.raises(error, match=message):
        parse_members(members)
