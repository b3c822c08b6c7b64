from __future__ import annotations

import subprocess
import sys

import pytest

from hf_atm.schedule import RoundPlan


PLAN = RoundPlan(("a", "b", "c"), (3, 1, 2), 2)


def walk(plan):
    """Every step of a run, written down the slow way."""
    return [
        (round_index, task, offset, length)
        for round_index in range(plan.num_rounds)
        for task, length in zip(plan.tasks, plan.lengths, strict=True)
        for offset in range(length)
    ]


def test_every_step_has_its_place():
    places = walk(PLAN)
    assert PLAN.total_steps == len(places) == 12 and PLAN.round_steps == 6
    assert [tuple(PLAN.locate(step))[:4] for step in range(12)] == places
    assert PLAN.locate(12).round == 2 and PLAN.locate(12).task == "a"


def test_segments_close_at_their_last_step():
    closed = {step: PLAN.closed_by(step) for step in range(13)}
    assert {step: (seg.round, seg.task, seg.start) for step, seg in closed.items() if seg is not None} == {
        3: (0, "a", 0),
        4: (0, "b", 3),
        6: (0, "c", 4),
        9: (1, "a", 6),
        10: (1, "b", 9),
        12: (1, "c", 10),
    }
    assert [step for step in range(13) if PLAN.is_round_end(step)] == [0, 6, 12]


def test_the_fingerprint_knows_tasks_lengths_and_rounds():
    others = [
        RoundPlan(("a", "b", "d"), (3, 1, 2), 2),
        RoundPlan(("a", "b", "c"), (3, 2, 1), 2),
        RoundPlan(("a", "b", "c"), (3, 1, 2), 3),
        RoundPlan(("b", "a", "c"), (3, 1, 2), 2),
    ]
    assert len({plan.fingerprint() for plan in (PLAN, *others)}) == 5
    assert RoundPlan(("a", "b", "c"), (3, 1, 2), 2).fingerprint() == PLAN.fingerprint()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (((), (), 1), "at least one task"),
        ((("a", "a"), (1, 1), 1), "must differ"),
        ((("a", "b"), (1,), 1), "2 tasks but 1"),
        ((("a",), (0,), 1), "'a' has a segment of 0"),
        ((("a",), (1,), 0), "num_rounds is 0"),
    ],
)
def test_plans_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        RoundPlan(*values)


def test_the_schedule_needs_no_torch():
    code = "import sys; import hf_atm.schedule; assert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
