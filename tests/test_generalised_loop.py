"""Weights by loss gap, searched steps, surgery and anchored task vectors, inside the loop, against plain torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from hf_atm import ATMCallback
from hf_atm.outer import loss_gap_weights
from tests.reference import atm_loop
from tests.test_loop_oracle import stored_batches
from tests.testing_utils import (
    METRICS,
    TASKS,
    TinyModel,
    largest_difference,
    make_datasets,
    make_trainer,
    parameters_of,
)


SIZES = {"colour": 40, "shape": 24, "size": 32}


def trained(output_dir, model=None, resume=None, **changes):
    trainer = make_trainer(
        output_dir,
        model,
        eval_dataset=make_datasets(),
        compute_metrics=METRICS,
        train_sampling_strategy="sequential",
        **changes,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def expected(model, rounds, merge, outer=None):
    return atm_loop.run(
        model,
        stored_batches(make_datasets(), 8),
        sorted(TASKS),
        rounds=rounds,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        merge=merge,
        outer=outer,
    )


@torch.no_grad()
def loss(model, task):
    model.eval()
    value = float(model(**make_datasets()[task][:], task=task).loss)
    model.train()
    return value


def test_loss_gaps_decide_the_weights(tmp_path):
    model, weights, gaps = TinyModel(), [], []
    batches = stored_batches(make_datasets(), 8)
    # The oracle: rounds one by one, so that losses can be read between them.
    current = model
    for _ in range(2):
        losses, tuned = {}, {}
        for task in sorted(TASKS):
            losses[task] = loss(copy.deepcopy(current), task)
        gaps.append({})
        vectors = []
        for task in sorted(TASKS):
            alone = atm_loop.run(
                current,
                batches,
                [task],
                rounds=1,
                make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
                merge=atm_loop.mean,
            )
            gaps[-1][task] = losses[task] - loss(alone, task)
            vectors.append(atm_loop.flatten(alone) - atm_loop.flatten(current))
            tuned[task] = alone
        exponentials = [math.exp(gaps[-1][task] / 0.3) for task in sorted(TASKS)]
        weights.append([3 * value / sum(exponentials) for value in exponentials])
        update = sum(w * v for w, v in zip(weights[-1], vectors, strict=True)) / 3
        start, current = atm_loop.flatten(current), copy.deepcopy(current)
        atm_loop.unflatten(current, start + update)
        for task in TASKS:
            current.heads[task].load_state_dict(tuned[task].heads[task].state_dict())

    trainer = trained(tmp_path, model, num_rounds=2, task_weights="loss_gap", loss_gap_temperature=0.3)
    assert largest_difference(parameters_of(current), parameters_of(trainer.model)) <= 1e-6
    for record, wanted, gap in zip(trainer.report, weights, gaps, strict=True):
        assert [record["weights"][task] for task in sorted(TASKS)] == pytest.approx(wanted, abs=1e-5)
        assert record["loss_gaps"] == pytest.approx(gap, abs=1e-5)
        assert record["searching"] == 2 * sum(SIZES.values())
        assert record["seconds"]["searching"] > 0
    assert max(weights[0]) > 1.1


def test_neutral_gaps_and_temperatures_weigh_equally():
    assert loss_gap_weights({"a": 0.7, "b": 0.7}) == pytest.approx({"a": 1.0, "b": 1.0})
    assert loss_gap_weights({"a": 0.0, "b": 5.0}, 1e9) == pytest.approx({"a": 1.0, "b": 1.0})
    assert loss_gap_weights({"a": 0.0, "b": math.log(3)}) == pytest.approx({"a": 0.5, "b": 1.5})


def test_a_searched_step_is_the_best_of_those_tried(tmp_path):
    trainer = trained(tmp_path, num_rounds=2, outer_learning_rate="search")
    for record in trainer.report:
        tried = dict(record["step_sizes_tried"])
        assert tried[record["step_size"]] == min(tried.values())
        assert record["searching"] == len(tried) * sum(SIZES.values())
    assert len({record["step_size"] for record in trainer.report}) == 2


def test_a_searched_step_gives_the_losses_it_was_chosen_for(tmp_path):
    model = TinyModel(batch_norm=True)
    first = trained(tmp_path / "search", copy.deepcopy(model), num_rounds=1, outer_learning_rate="search")
    record = first.report[0]
    losses = {task: loss(first.model, task) for task in TASKS}
    again = trained(tmp_path / "fixed", copy.deepcopy(model), num_rounds=1, outer_learning_rate=record["step_size"])
    assert largest_difference(parameters_of(first.model), parameters_of(again.model)) <= 1e-6
    start = trained(tmp_path / "norm", copy.deepcopy(model), num_rounds=1, outer_learning_rate="norm")
    reference = {task: loss(start.model, task) for task in TASKS}
    relative = sum(losses[task] / reference[task] for task in TASKS) / 3
    assert dict(record["step_sizes_tried"])[record["step_size"]] == pytest.approx(relative, rel=1e-4)


@pytest.mark.parametrize("mode", ["delta", "svd", "adapter"])
def test_a_search_works_on_adapters(tmp_path, mode):
    settings = {"peft_config": LoraConfig(r=2, target_modules=["body.0", "body.2"]), "lora_merge_mode": mode}
    first = trained(tmp_path / "search", num_rounds=1, outer_learning_rate="search", **settings)
    step = first.report[0]["step_size"]
    again = trained(tmp_path / "fixed", num_rounds=1, outer_learning_rate=step, **settings)
    assert largest_difference(parameters_of(first.model), parameters_of(again.model)) <= 1e-6
    assert len(first.report[0]["step_sizes_tried"]) >= 3


def test_pcgrad_in_the_loop_equals_projected_vectors(tmp_path):
    from hf_atm.seeding import derive_seed

    def merge_in(round_index):
        def merge(vectors):
            result = []
            for t, task in enumerate(sorted(TASKS)):
                vector, others = vectors[t], [s for s in range(3) if s != t]
                seed = derive_seed(derive_seed(42, "surgery", round_index), "pcgrad", task)
                for index in torch.randperm(2, generator=torch.Generator().manual_seed(seed)).tolist():
                    other = vectors[others[index]]
                    if vector @ other < 0:
                        vector = vector - (vector @ other) / (other @ other) * other
                result.append(vector)
            return torch.stack(result).mean(0)

        return merge

    model = TinyModel()
    wanted = expected(model, 1, merge_in(0))
    trainer = trained(tmp_path, copy.deepcopy(model), num_rounds=1, task_vector_surgery="pcgrad")
    assert largest_difference(parameters_of(wanted), parameters_of(trainer.model)) <= 1e-6
    plain = trained(tmp_path / "plain", copy.deepcopy(model), num_rounds=1)
    assert largest_difference(parameters_of(plain.model), parameters_of(trainer.model)) > 1e-4


def test_an_anchored_mean_with_step_one_is_the_plain_mean(tmp_path):
    model = TinyModel()
    anchored = trained(tmp_path / "anchored", copy.deepcopy(model), task_vector_origin="start")
    plain = trained(tmp_path / "plain", copy.deepcopy(model))
    assert largest_difference(parameters_of(anchored.model), parameters_of(plain.model)) <= 1e-6
    norms = [sum(record["task_vector_norms"].values()) for record in anchored.report]
    assert norms[2] > norms[1] > norms[0]


def test_an_anchored_step_scales_the_whole_way_from_the_start(tmp_path):
    model = TinyModel()
    start = atm_loop.flatten(model)
    bases = [start]

    def outer(update, round_index):
        # The plain loop adds to the round's base; an anchored merge goes from the start.
        displacement = bases[-1] + update - start
        bases.append(start + 1.5 * displacement)
        return bases[-1] - bases[-2]

    wanted = expected(model, 3, atm_loop.mean, outer)
    trainer = trained(tmp_path, copy.deepcopy(model), task_vector_origin="start", outer_learning_rate=1.5)
    assert largest_difference(parameters_of(wanted), parameters_of(trainer.model)) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"task_weights": "loss_gap"},
        {"outer_learning_rate": "search"},
        {"task_vector_surgery": "gram_schmidt"},
        {"task_vector_origin": "start", "outer_learning_rate": 1.5},
        {"task_vector_origin": "start", "merge_method": "consensus", "task_weights": "loss_gap"},
    ],
)
@pytest.mark.parametrize("step", [7, 12])
def test_resumes_bit_by_bit(tmp_path, settings, step):
    settings = {**settings, "num_rounds": 2, "save_strategy": "steps", "save_steps": step, "logging_strategy": "no"}
    whole = trained(tmp_path, TinyModel(dropout=0.2), **settings)
    records = [{**record, "seconds": None} for record in whole.report]
    again = trained(tmp_path, TinyModel(dropout=0.2), resume=str(tmp_path / f"checkpoint-{step}"), **settings)
    assert largest_difference(parameters_of(whole.model), parameters_of(again.model)) == 0.0
    assert [{**record, "seconds": None} for record in again.report] == records


def test_the_norm_rule_restores_clipped_norms(tmp_path):
    trainer = trained(tmp_path, num_rounds=1, outer_learning_rate="norm", max_task_vector_norm=0.01)
    record = trainer.report[0]
    assert min(record["task_vector_norms"].values()) > 0.01
    assert record["merged_norm"] * record["step_size"] == pytest.approx(0.01, rel=1e-5)


def test_a_task_without_weight_changes_nothing(tmp_path):
    model, states = TinyModel(), []
    for data in (make_datasets(), {**make_datasets(), "size": make_datasets()["size"].select(range(8, 32))}):
        trainer = make_trainer(
            tmp_path / str(len(states)),
            copy.deepcopy(model),
            train_dataset=data,
            num_rounds=1,
            task_weights={"colour": 1.0, "shape": 2.0, "size": 0.0},
            task_vector_surgery="pcgrad",
            outer_learning_rate="norm",
        )
        trainer.train()
        states.append({n: v for n, v in parameters_of(trainer.model).items() if "heads" not in n})
    assert largest_difference(*states) <= 1e-7


@pytest.mark.parametrize("surgery", ["pcgrad", "gram_schmidt"])
def test_exported_experts_are_the_experts_after_surgery(tmp_path, surgery):
    config = LoraConfig(r=2, target_modules=["body.0", "body.2"])
    experts = {}

    class Keep(ATMCallback):
        def on_task_end(self, args, state, control, *, round, task, model, **kwargs):
            with torch.no_grad():
                experts[task] = model(features=probe, task=task).logits

    probe = torch.randn(5, 6)
    trainer = make_trainer(
        tmp_path / "run",
        peft_config=config,
        num_rounds=2,
        head_steps=1,
        task_vector_surgery=surgery,
        callbacks=[Keep()],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for task in TASKS:
        merged = TinyModel()
        merged.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
        expert = PeftModel.from_pretrained(merged, str(tmp_path / "saved" / "adapters" / task))
        with torch.no_grad():
            assert (expert(features=probe, task=task).logits - experts[task]).abs().max() <= 1e-5


def test_an_adapter_cannot_be_anchored(tmp_path):
    config = LoraConfig(r=2, target_modules=["body.0"])
    with pytest.raises(ValueError, match="task_vector_origin='start' needs whole weights"):
        make_trainer(tmp_path, peft_config=config, task_vector_origin="start")
