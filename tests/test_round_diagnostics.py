"""What the loop measures about its rounds, beside plain arithmetic on the weights that callbacks saw."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from hf_atm import ATMCallback
from hf_atm.analysis import diagnose, size_loss_covariance
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


SHARED = ("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01}


class Witness(ATMCallback):
    """Keeps every base and every expert."""

    def __init__(self):
        self.bases, self.experts, self.heads = [], [], []

    def on_round_begin(self, args, state, control, *, model, **kwargs):
        self.bases.append(flat(model))
        self.experts.append({})

    def on_task_end(self, args, state, control, *, task, model, **kwargs):
        self.experts[-1][task] = {name: value.clone() for name, value in model.state_dict().items()}


def flat(model):
    state = model.state_dict()
    return torch.cat([state[name].double().ravel() for name in sorted(SHARED)])


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("keep", [False, True])
def test_moves_and_their_persistence(tmp_path, keep):
    witness = Witness()
    trainer = make_trainer(tmp_path, callbacks=[witness], keep_task_vectors=keep, outer_momentum=0.5, **ADAM)
    trainer.train()
    bases = [*witness.bases, flat(trainer.model)]
    moves = [after - before for before, after in zip(bases, bases[1:], strict=False)]
    assert len(moves) == 3
    for index, record in enumerate(trainer.report):
        found = record["diagnostics"]
        assert found["drift"] == pytest.approx(float(moves[index].norm()), rel=1e-5)
        assert found["drift_from_start"] == pytest.approx(float((bases[index + 1] - bases[0]).norm()), rel=1e-5)
        if index:
            assert found["outer_persistence"] == pytest.approx(cosine(moves[index], moves[index - 1]), abs=1e-5)
    assert trainer.report[0]["diagnostics"]["outer_persistence"] is None


def test_moves_from_the_start(tmp_path):
    witness = Witness()
    trainer = make_trainer(tmp_path, callbacks=[witness], task_vector_origin="start", outer_learning_rate=0.7)
    trainer.train()
    bases = [*witness.bases, flat(trainer.model)]
    found = trainer.report[2]["diagnostics"]
    assert found["drift"] == pytest.approx(float((bases[3] - bases[2]).norm()), rel=1e-4)
    assert found["drift_from_start"] == pytest.approx(float((bases[3] - bases[0]).norm()), rel=1e-5)
    assert "gradient_cosines" not in found


def test_one_full_batch_step_is_the_gradient(tmp_path):
    data = {task: make_data(task, 16) for task in TASKS}
    trainer = make_trainer(tmp_path, train_dataset=data, full_batch=True, max_grad_norm=0.0)
    trainer.train()
    for record in trainer.report:
        assert record["diagnostics"]["gradient_cosines"] == pytest.approx(dict.fromkeys(TASKS, 1.0), abs=1e-6)
        assert record["diagnostics"]["gradient_distances"] == pytest.approx(dict.fromkeys(TASKS, 0.0), abs=1e-5)


@pytest.mark.parametrize("merge", [{}, {"merge_method": "ties"}])
def test_gradients_where_a_segment_begins(tmp_path, merge):
    """AdamW: the first step's gradient, computed again at the base, beside the task vector and the rates' sum."""
    witness = Witness()
    data = {task: make_data(task, 24) for task in TASKS}
    settings = {"num_rounds": 1, "lr_scheduler_type": "linear", "max_grad_norm": 0.0, **ADAM, **merge}
    trainer = make_trainer(tmp_path, train_dataset=data, callbacks=[witness], **settings)
    model = TinyModel()
    start = flat(model)
    trainer.train()
    found = trainer.report[0]["diagnostics"]
    batches = list(DataLoader(trainer.atm.round_dataset, batch_size=8, collate_fn=trainer.data_collator))
    # A linear schedule over the segment's three steps: 1, 2/3, 1/3 of the rate.
    rate = 0.01 * 2
    for index, task in enumerate(sorted(TASKS)):
        model.zero_grad()
        batch = {name: value for name, value in batches[3 * index].items() if name != "task"}
        model(**batch, task=task).loss.backward()
        named = dict(model.named_parameters())
        gradient = torch.cat([named[name].grad.double().ravel() for name in sorted(SHARED)])
        expert = witness.experts[0][task]
        vector = torch.cat([expert[name].double().ravel() for name in sorted(SHARED)]) - start
        assert found["gradient_cosines"][task] == pytest.approx(cosine(vector, -gradient), abs=1e-5)
        distance = float((vector + rate * gradient).norm() / vector.norm())
        assert found["gradient_distances"][task] == pytest.approx(distance, abs=1e-5)


def test_full_diagnostics_are_those_of_the_task_vectors(tmp_path):
    witness = Witness()
    trainer = make_trainer(tmp_path, callbacks=[witness], diagnostics="full", **ADAM)
    trainer.train()
    bases = [*witness.bases, flat(trainer.model)]
    for index, record in enumerate(trainer.report):
        before = unflat(bases[index], trainer.model)
        vectors = {
            task: {name: expert[name] - before[name] for name in SHARED}
            for task, expert in witness.experts[index].items()
        }
        move = {name: unflat(bases[index + 1], trainer.model)[name] - before[name] for name in SHARED}
        expected = diagnose(vectors, move)
        found = record["diagnostics"]["task_vectors"]
        assert found["norms"] == pytest.approx(expected.norms, rel=1e-5)
        assert found["interference"] == pytest.approx(expected.interference, rel=1e-4)
        assert found["effective_rank"] == pytest.approx(expected.effective_rank, rel=1e-3)
        assert found["sign_conflict"] == expected.sign_conflict
        assert found["alignment"] == pytest.approx(expected.alignment, abs=1e-3)
        assert "barriers" not in record["diagnostics"]
    assert json.loads((tmp_path / "atm_report.json").read_text())["rounds"][0]["diagnostics"]["task_vectors"]


def unflat(vector, model):
    result, offset = {}, 0
    for name in sorted(SHARED):
        shape = model.state_dict()[name].shape
        result[name] = vector[offset : offset + shape.numel()].view(shape).float()
        offset += shape.numel()
    return result


def test_barriers_between_experts_and_the_merged_model(tmp_path):
    witness, data = Witness(), make_datasets()
    trainer = make_trainer(
        tmp_path, callbacks=[witness], diagnostics="full", eval_dataset=data, compute_metrics=METRICS, num_rounds=1,
        learning_rate=0.3, eval_experts=True, eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    merged, found = parameters_of(trainer.model), trainer.report[0]["diagnostics"]

    def loss(task, share):
        model = TinyModel()
        expert = witness.experts[0][task]
        # The head of the task is its own, whatever the shared weights.
        model.load_state_dict(
            {n: (1 - share) * merged[n] + share * expert[n] if n in SHARED else merged[n] for n in merged}
        )
        rows = data[task][:]
        with torch.no_grad():
            return float(model(rows["features"], rows["labels"], task=task).loss)

    for task in TASKS:
        barrier = loss(task, 0.5) - (loss(task, 0) + loss(task, 1)) / 2
        assert found["barriers"][task] == pytest.approx(barrier, abs=1e-5)
        assert found["gap_to_experts"][task] == pytest.approx(loss(task, 0) - loss(task, 1), abs=1e-5)
    losses = {task: loss(task, 0) for task in TASKS}
    sizes = {task: len(rows) for task, rows in data.items()}
    pooled = sum(sizes[t] * losses[t] for t in TASKS) / sum(sizes.values())
    assert found["size_loss_covariance"] == pytest.approx(pooled - sum(losses.values()) / 3, abs=1e-6)
    assert size_loss_covariance(sizes, losses) == pytest.approx(found["size_loss_covariance"], abs=1e-6)
    assert trainer.report[0]["searching"] == 0


def test_measuring_changes_nothing(tmp_path):
    results = []
    for level in ("off", "cheap", "full"):
        settings = {"diagnostics": level, "eval_dataset": make_datasets(), "keep_task_vectors": True, **ADAM}
        trainer = make_trainer(tmp_path / level, TinyModel(dropout=0.3), **settings)
        trainer.train()
        results.append(parameters_of(trainer.model))
        assert bool(trainer.report[0]["diagnostics"]) == (level != "off")
    assert largest_difference(results[0], results[1]) == largest_difference(results[0], results[2]) == 0.0


@pytest.mark.parametrize("mode", ["delta", "svd", "adapter"])
def test_adapters(tmp_path, mode):
    peft = LoraConfig(r=2, target_modules=["body.0", "body.2"])
    trainer = make_trainer(tmp_path, peft_config=peft, lora_merge_mode=mode, diagnostics="full", **ADAM)
    trainer.train()
    found = trainer.report[-1]["diagnostics"]
    assert found["task_vectors"]["interference"] > 0 and found["drift"] > 0
    # Only factors merged as weights have gradients of their own.
    assert ("gradient_cosines" in found) == (mode == "adapter")


def test_trackers_see_scalars(tmp_path):
    trainer = make_trainer(tmp_path, diagnostics="full", eval_dataset=make_datasets(), logging_steps=1, **ADAM)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "atm_drift" in entry]
    assert [entry["atm_drift"] for entry in entries] == [r["diagnostics"]["drift"] for r in trainer.report]
    assert {"atm_cosine_mean", "atm_norm_dispersion", "atm_step_size", "atm_interference", "atm_sign_conflict"} < set(
        entries[0]
    )
    assert entries[1]["atm_outer_persistence"] == trainer.report[1]["diagnostics"]["outer_persistence"]
    barriers = trainer.report[2]["diagnostics"]["barriers"]
    assert entries[2]["atm_barriers_mean"] == pytest.approx(sum(barriers.values()) / 3)
    silent = make_trainer(tmp_path / "silent", logging_strategy="no")
    silent.train()
    assert not any("atm_drift" in entry for entry in silent.state.log_history)


def test_unknown_level(tmp_path):
    with pytest.raises(ValueError, match="diagnostics is 'deep'; choose one of off, cheap, full"):
        make_trainer(tmp_path, diagnostics="deep")
