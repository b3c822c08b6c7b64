"""Heads that settle on the merged weights: against plain torch, and what must stay as it is."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_atm import ATMCallback
from hf_atm.data import RoundDataset, head_step_counts
from hf_atm.schedule import RoundPlan
from tests.reference import atm_loop
from tests.test_loop_oracle import stored_batches
from tests.testing_utils import (
    METRICS,
    TASKS,
    TinyModel,
    largest_difference,
    make_data,
    make_datasets,
    make_trainer,
    parameters_of,
)


def test_a_round_of_tuning_merging_and_settling():
    plan = RoundPlan(("a", "b"), (3, 2), 2, head_steps=(1, 1))
    places = [(p.task, p.offset, p.settling) for p in (plan.locate(step) for step in range(7))]
    assert places == [
        ("a", 0, False),
        ("a", 1, False),
        ("a", 2, False),
        ("b", 0, False),
        ("b", 1, False),
        ("a", 0, True),
        ("b", 0, True),
    ]
    assert plan.total_steps == 14 and [step for step in range(1, 15) if plan.is_merge(step)] == [5, 12]
    assert [plan.own_step(step) for step in (0, 2, 5, 7, 12)] == [0, 2, 3, 4, 7]
    assert plan.closed_by(6) == (0, "a", 5, 1, True) and plan.is_round_end(7)
    plain = RoundPlan(("a", "b"), (4, 3), 2)
    assert plain.task_steps == plan.task_steps
    assert [step for step in range(1, 15) if plain.is_merge(step)] == [7, 14]


def test_settling_reads_on_where_tuning_stopped():
    rows = {"a": list(range(40)), "b": list(range(24))}
    settled = RoundDataset(rows, RoundPlan(("a", "b"), (3, 2), 2, head_steps=(1, 1)), 4, seed=0)
    plain = RoundDataset(rows, RoundPlan(("a", "b"), (4, 3), 2), 4, seed=0)
    read = {
        name: {task: [d.locate(i)[2] for i in range(len(d)) if d.locate(i)[0] == task] for task in rows}
        for name, d in (("settled", settled), ("plain", plain))
    }
    assert read["settled"] == read["plain"]


def plain_loop(model, rounds, head_steps, ratio):
    """Tune, average, then train each head over the averaged weights, in stored order of examples."""
    model, data = copy.deepcopy(model), make_datasets()
    for _ in range(rounds):
        start, vectors, heads = atm_loop.flatten(model), [], {}
        batches = {task: stored_batches(data, 8)(0, task) for task in sorted(TASKS)}
        for task in sorted(TASKS):
            tuned = copy.deepcopy(model)
            _train(tuned, atm_loop.shared(tuned), batches[task][:-head_steps], task, 0.05, ratio)
            vectors.append(atm_loop.flatten(tuned) - start)
            heads[task] = tuned.heads[task].state_dict()
        atm_loop.unflatten(model, start + atm_loop.mean(vectors))
        for task in sorted(TASKS):
            model.heads[task].load_state_dict(heads[task])
            _train(model, [], batches[task][-head_steps:], task, 0.05, ratio)
    return model


def _train(model, shared, batches, task, rate, ratio):
    head = list(model.heads[task].parameters())
    groups = [{"params": shared}] if shared else []
    optimizer = torch.optim.AdamW([*groups, {"params": head, "lr": rate * ratio}], lr=rate, weight_decay=0.0)
    for batch in batches:
        loss = model(**batch, task=task).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*shared, *head], 1.0)
        optimizer.step()


def test_matches_a_plain_loop(tmp_path):
    model = TinyModel()
    expected = plain_loop(model, rounds=2, head_steps=1, ratio=3.0)
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(model),
        num_rounds=2,
        head_steps=1,
        head_learning_rate_ratio=3.0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert largest_difference(parameters_of(expected), parameters_of(trainer.model)) <= 1e-6
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_settling_moves_heads_only_and_ends_before_the_round_is_scored(tmp_path):
    seen = {}

    class Watch(ATMCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = parameters_of(model)

        def on_round_end(self, args, state, control, *, round, report, **kwargs):
            seen[f"round {round}"] = state.global_step

    trainer = make_trainer(
        tmp_path,
        num_rounds=1,
        head_steps=1,
        weight_decay=0.1,
        optim="adamw_torch",
        eval_strategy="epoch",
        eval_dataset=make_datasets(),
        compute_metrics=METRICS,
        callbacks=[Watch()],
    )
    plan = trainer.atm.plan
    trainer.train()
    last_tuning = sum(plan.lengths)
    for step in range(last_tuning + 1, plan.total_steps + 1):
        task = plan.locate(step - 1).task
        moved = {name for name, value in seen[step].items() if not torch.equal(value, seen[step - 1][name])}
        assert moved == {f"heads.{task}.weight", f"heads.{task}.bias"}
    assert seen["round 0"] == plan.total_steps
    assert trainer.report[0]["scores"] == pytest.approx(trainer.quiet_scores(trainer.eval_dataset))
    assert set(trainer.report[0]["losses"]) == set(TASKS)


@pytest.mark.parametrize("policy", ["reset", "per_task"])
@pytest.mark.parametrize("step", [8, 9, 10, 12, 13, 21])
def test_resumes_bit_by_bit(tmp_path, policy, step):
    settings = {
        "num_rounds": 2,
        "head_steps": 1,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "lr_schedule_scope": "run",
        "head_learning_rate_ratio": 2.0,
        "weight_decay": 0.01,
        "optimizer_policy": policy,
        "save_strategy": "steps",
        "save_steps": step,
    }
    whole = make_trainer(tmp_path, TinyModel(dropout=0.2), **settings)
    whole.train()
    again = make_trainer(tmp_path, TinyModel(dropout=0.2), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert largest_difference(parameters_of(whole.model), parameters_of(again.model)) == 0.0
    # A logged loss is that since the last start; seconds are no one's.
    left_out = {"seconds": None, "losses": None}
    records = [[{**record, **left_out} for record in trainer.report] for trainer in (whole, again)]
    assert records[0] == records[1] and len(records[0]) == 2


def test_a_stop_while_settling_leaves_the_merged_weights(tmp_path):
    class Stop(ATMCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 10

    trainer = make_trainer(tmp_path, num_rounds=2, head_steps=1, callbacks=[Stop()])
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    reference = make_trainer(tmp_path / "reference", num_rounds=1, head_steps=1)
    reference.train()
    body = {name: value for name, value in parameters_of(trainer.model).items() if "heads" not in name}
    wanted = {name: value for name, value in parameters_of(reference.model).items() if "heads" not in name}
    assert largest_difference(body, wanted) == 0.0


def test_rates_of_head_steps(tmp_path):
    trainer = make_trainer(
        tmp_path,
        train_dataset={"colour": make_data("colour", 32), "shape": make_data("shape", 32)},
        model=TinyModel({"colour": 3, "shape": 2}),
        num_rounds=2,
        head_steps=1,
        lr_scheduler_type="linear",
        lr_schedule_scope="run",
    )
    rate = trainer.atm.rates()
    # Eight steps per task: colour takes 3, shape 3, then one each for the heads.
    assert [rate(step) for step in range(8)] == [1, 7 / 8, 6 / 8, 1, 7 / 8, 6 / 8, 5 / 8, 5 / 8]


def test_heads_have_groups_of_their_own_rate(tmp_path):
    seen = []

    class Watch(ATMCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            seen.append({id(p): group["lr"] for group in inner.param_groups for p in group["params"]})

    trainer = make_trainer(
        tmp_path,
        num_rounds=1,
        head_learning_rate_ratio=4.0,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        callbacks=[Watch()],
    )
    trainer.train()
    for rates in seen:
        values = {name: rates[id(p)] for name, p in trainer.model.named_parameters()}
        shared = {value for name, value in values.items() if "heads" not in name}
        heads = {value for name, value in values.items() if "heads" in name}
        assert len(shared) == len(heads) == 1
        assert heads.pop() == pytest.approx(4 * shared.pop())
    assert len({max(rates.values()) for rates in seen}) > 1


def test_a_fraction_of_the_steps(tmp_path):
    assert head_step_counts({"a": 20, "b": 3}, 0.2) == {"a": 4, "b": 1}
    assert head_step_counts({"a": 20, "b": 3}, 2.0) == {"a": 2, "b": 2}
    assert head_step_counts({"a": 20}, 0) == {"a": 0}
    plan = make_trainer(tmp_path, head_steps=0.4).atm.plan
    assert plan.lengths == (3, 2, 2) and plan.head_steps == (2, 1, 2)
    assert plan.total_steps == make_trainer(tmp_path / "plain").atm.plan.total_steps


def test_more_head_steps_than_steps(tmp_path):
    with pytest.raises(ValueError, match="head_steps=3 leaves nothing of the 3 steps of task 'shape'"):
        make_trainer(tmp_path, head_steps=3)


def test_nothing_private_to_settle(tmp_path):
    model = TinyModel()
    model.heads["shape"].requires_grad_(False)
    with pytest.raises(ValueError, match="task 'shape' has no head or other private module that learns"):
        make_trainer(tmp_path, model, head_steps=1)
