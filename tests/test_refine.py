"""Post-hoc ATM keeps the best round, or the start."""

from __future__ import annotations

import copy

import datasets
import pytest
from transformers import TrainerCallback

from hf_atm import ATMTrainer
from hf_atm.refine import refine, refine_arguments, split_for_refining
from tests.testing_utils import (
    METRICS,
    TASKS,
    TinyModel,
    largest_difference,
    make_config,
    make_data,
    make_datasets,
    parameters_of,
)


def trainer_for(output_dir, model, metrics=METRICS, **changes):
    args = refine_arguments(make_config(output_dir, **changes), has_metrics=metrics is not None)
    return ATMTrainer(
        model,
        args,
        train_dataset=make_datasets(),
        eval_dataset={task: make_data(task, 32) for task in TASKS},
        compute_metrics=metrics,
    )


@pytest.mark.parametrize("metrics", [METRICS, None])
def test_the_best_round_is_kept(tmp_path, metrics):
    trainer = trainer_for(tmp_path, TinyModel(), metrics, num_rounds=4, learning_rate=0.3)
    result = refine(trainer)
    assert result.metric == ("eval_loss" if metrics is None else "eval_average")
    assert len(result.rounds) == 4 and result.best_round > 0
    best = min(result.rounds) if metrics is None else max(result.rounds)
    assert result.best == best == result.rounds[result.best_round - 1]
    assert trainer.evaluate()[result.metric] == pytest.approx(best)


def test_a_run_that_only_gets_worse_ends_at_its_start(tmp_path):
    model = TinyModel()
    good = trainer_for(tmp_path / "good", model, num_rounds=12, learning_rate=0.2)
    refine(good)
    before = parameters_of(model)
    # A step of fifty times the mean throws the model far away in every round.
    trainer = trainer_for(tmp_path / "bad", model, num_rounds=2, learning_rate=0.3, outer_learning_rate=50.0)
    result = refine(trainer)
    assert result.best_round == 0 and max(result.rounds) < result.start["eval_average"] == result.best
    assert largest_difference(before, parameters_of(model)) == 0.0
    assert result.to_dict()["best"] == result.best


def test_an_interrupted_refinement_goes_on(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 14:
                raise KeyboardInterrupt

    model, settings = TinyModel(), {"num_rounds": 3, "learning_rate": 0.2}
    whole = trainer_for(tmp_path / "whole", copy.deepcopy(model), **settings)
    wanted = refine(whole)
    broken = trainer_for(tmp_path / "run", copy.deepcopy(model), **settings)
    broken.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        refine(broken)
    again = trainer_for(tmp_path / "run", copy.deepcopy(model), **settings)
    assert refine(again, resume_from_checkpoint=True) == wanted
    assert largest_difference(parameters_of(whole.model), parameters_of(again.model)) == 0.0


@pytest.mark.parametrize("when", [0, 2])
def test_rounds_before_a_divergence_stand(tmp_path, when):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == when * 6 + 1:
                next(model.parameters()).data.fill_(float("nan"))

    model = TinyModel()
    before = parameters_of(model)
    trainer = trainer_for(tmp_path, model, num_rounds=4, learning_rate=0.3, local_steps=2)
    trainer.add_callback(Break())
    result = refine(trainer)
    assert "lower learning_rate" in result.stopped and len(result.rounds) == when
    assert trainer.evaluate()["eval_average"] == pytest.approx(result.best)
    if when:
        assert result.best_round > 0 and result.best == max(result.rounds) > result.start["eval_average"]
    else:
        assert result.best_round == 0 and largest_difference(before, parameters_of(model)) == 0.0


@pytest.mark.parametrize("when", ["start", "first round"])
def test_a_score_that_is_no_number_is_the_worst(tmp_path, when):
    counts = {"calls": 0}

    def sometimes(prediction):
        counts["calls"] += 1
        broken = (counts["calls"] <= 3) if when == "start" else (3 < counts["calls"] <= 6)
        return {"score": float("nan") if broken else counts["calls"] / 100}

    trainer = trainer_for(tmp_path, TinyModel(), sometimes, num_rounds=2)
    result = refine(trainer)
    assert result.best_round == 2 and result.best > 0


def test_the_users_own_choice_of_metric_is_kept(tmp_path):
    trainer = trainer_for(tmp_path, TinyModel(), num_rounds=2, metric_for_best_model="worst", greater_is_better=True)
    assert refine(trainer).metric == "eval_worst"


def test_settings_that_keep_no_round_are_refused(tmp_path):
    args = make_config(tmp_path)
    data = make_datasets()
    trainer = ATMTrainer(TinyModel(), args, train_dataset=data, eval_dataset=data, compute_metrics=METRICS)
    with pytest.raises(ValueError, match="refine_arguments"):
        refine(trainer)


def numbered(size):
    return {"a": datasets.Dataset.from_dict({"x": list(range(size))})}


def test_parts_share_no_example_and_are_shuffled():
    tune, choose = split_for_refining(numbered(100), share=0.5, holdout=0.2, seed=3)
    first, second = tune["a"]["x"][:], choose["a"]["x"][:]
    assert len(first) == 40 and len(second) == 10 and not set(first) & set(second)
    assert first != sorted(first)
    again, _ = split_for_refining(numbered(100), share=0.5, holdout=0.2, seed=3)
    assert again["a"]["x"][:] == first
    everything, nothing = split_for_refining(numbered(10), holdout=0.0)
    assert sorted(everything["a"]["x"][:]) == list(range(10)) and nothing == {}


@pytest.mark.parametrize(
    ("size", "share", "holdout", "message"),
    [
        (10, 0.0, 0.2, "share is 0.0"),
        (10, 1.5, 0.2, "share is 1.5"),
        (10, 1.0, 1.0, "holdout is 1.0"),
        (10, 0.1, 0.2, "Task 'a' has 10 examples, too few for share=0.1 and holdout=0.2"),
    ],
)
def test_bad_parts(size, share, holdout, message):
    with pytest.raises(ValueError, match=message):
        split_for_refining(numbered(size), share, holdout)
