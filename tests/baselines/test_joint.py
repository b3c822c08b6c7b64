"""Joint training against a plain loop, and against what a round of ATM reads."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from hf_atm.baselines.joint import JointPlan, JointTrainer, proportional_lengths
from tests.reference import joint_loop
from tests.testing_utils import (
    METRICS,
    TASKS,
    TinyModel,
    largest_difference,
    make_config,
    make_datasets,
    make_trainer,
    parameters_of,
)


SIZES = {"colour": 40, "shape": 24, "size": 32}


def joint(output_dir, model=None, proportional=False, resume=None, callbacks=None, **changes):
    trainer = JointTrainer(
        TinyModel() if model is None else model,
        make_config(output_dir, **changes),
        train_dataset=make_datasets(),
        eval_dataset=make_datasets(),
        compute_metrics=METRICS,
        callbacks=callbacks,
        proportional=proportional,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_round_holds_every_task_as_often_as_its_length_says():
    plan = JointPlan(("a", "b"), (3, 2), 4, seed=1)
    orders = []
    for round_index in range(4):
        positions = [plan.locate(5 * round_index + step) for step in range(5)]
        assert Counter(position.task for position in positions) == {"a": 3, "b": 2}
        for task in ("a", "b"):
            offsets = [position.offset for position in positions if position.task == task]
            assert offsets == list(range(len(offsets)))
        orders.append("".join(position.task for position in positions))
    assert len(set(orders)) > 1
    assert plan.closed_by(3) is None and plan.is_round_end(10)


@pytest.mark.parametrize("sizes", [{"a": 10, "b": 1000, "c": 300}, {"a": 1, "b": 1, "c": 1}])
def test_proportional_lengths_share_out_every_step(sizes):
    lengths = proportional_lengths(sizes, 30)
    assert sum(lengths.values()) == 30 and min(lengths.values()) >= 1
    for task, size in sizes.items():
        assert abs(lengths[task] - 1 - 27 * size / sum(sizes.values())) < 1


@pytest.mark.parametrize("proportional", [False, True])
def test_matches_a_plain_loop(tmp_path, proportional):
    model, data = TinyModel(), make_datasets()
    settings = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "train_sampling_strategy": "sequential"}
    trainer = joint(tmp_path, copy.deepcopy(model), proportional, num_rounds=2, **settings)
    plan = trainer.atm.plan

    def batches():
        for step in range(plan.total_steps):
            position = plan.locate(step)
            columns, size = data[position.task][:], SIZES[position.task]
            rows = [(position.offset * 8 + i) % size for i in range(8)]
            yield position.task, {name: values[rows] for name, values in columns.items()}

    expected = joint_loop.run(
        model,
        batches(),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0),
        rate=lambda step: 1 - step / plan.total_steps,
    )
    assert largest_difference(parameters_of(expected), parameters_of(trainer.model)) <= 1e-6


def test_reads_the_examples_of_a_run_of_atm(tmp_path):
    seen = {}
    for name, trainer in (("joint", joint(tmp_path / "joint")), ("atm", make_trainer(tmp_path / "atm"))):
        dataset = trainer.atm.round_dataset
        dataset.set_epoch(1)
        seen[name] = Counter((task, row) for task, _, row in (dataset.locate(i) for i in range(len(dataset))))
    assert seen["joint"] == seen["atm"]
    assert set(task for task, _ in seen["joint"]) == set(TASKS)


def test_resumes_bit_by_bit_in_the_middle_of_a_round(tmp_path):
    settings = {
        "num_rounds": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 7,
    }
    whole = joint(tmp_path / "whole", TinyModel(dropout=0.2), **settings)
    again = joint(
        tmp_path / "whole", TinyModel(dropout=0.2), resume=str(tmp_path / "whole" / "checkpoint-7"), **settings
    )
    assert largest_difference(parameters_of(whole.model), parameters_of(again.model)) == 0.0
    assert [record["scores"] for record in again.report] == [record["scores"] for record in whole.report]
    assert len(whole.report) == 2 and whole.report[-1]["scores"].keys() == TASKS.keys()


def test_a_checkpoint_of_atm_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="epoch").train()
    with pytest.raises(ValueError, match="belongs to a different run"):
        joint(tmp_path, resume=True)


def test_a_frozen_backbone_trains_heads_only(tmp_path):
    model = TinyModel()
    model.body.requires_grad_(False)
    before = parameters_of(model)
    after = parameters_of(joint(tmp_path, model, num_rounds=1).model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("heads.")}


def test_task_specific_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="task_specific_modules"):
        joint(tmp_path, task_specific_modules=["body.0"])
