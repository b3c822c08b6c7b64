"""The loop against an independent one in plain torch, and against its theory."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.reference import atm_loop
from tests.testing_utils import (
    TASKS,
    TinyModel,
    largest_difference,
    make_data,
    make_datasets,
    make_trainer,
    parameters_of,
)


def stored_batches(data, batch_size, epochs=1):
    """Batches in stored order, as `train_sampling_strategy="sequential"` reads them."""

    def batches(_round, task):
        columns = data[task][:]
        size = len(columns["labels"])
        rows = list(range(size)) * epochs
        steps = -(-len(rows) // batch_size)
        rows = [rows[i % size] for i in range(steps * batch_size)]
        return [
            {name: values[rows[i : i + batch_size]] for name, values in columns.items()}
            for i in range(0, len(rows), batch_size)
        ]

    return batches


@pytest.mark.parametrize(
    ("optim", "make_optimizer"),
    [
        ("sgd", lambda params: torch.optim.SGD(params, lr=0.05)),
        ("adamw_torch", lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.0)),
    ],
)
@pytest.mark.parametrize(
    ("method", "kwargs", "reference"),
    [
        ("mean", {}, atm_loop.mean),
        ("ties", {"density": 0.3, "min_sparse_numel": 0}, lambda vectors: atm_loop.ties(vectors, 0.3)),
    ],
)
def test_matches_a_plain_loop(tmp_path, optim, make_optimizer, method, kwargs, reference):
    model, data = TinyModel(), make_datasets()
    expected = atm_loop.run(
        model, stored_batches(data, 8), sorted(TASKS), rounds=3, make_optimizer=make_optimizer, merge=reference
    )
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(model),
        train_dataset=data,
        train_sampling_strategy="sequential",
        optim=optim,
        merge_method=method,
        merge_kwargs=kwargs,
    )
    trainer.train()
    assert largest_difference(parameters_of(expected), parameters_of(trainer.model)) <= 1e-6


def test_momentum_and_nesterov_match_torch_sgd_on_the_negated_update(tmp_path):
    model, data = TinyModel(), make_datasets()
    for nesterov in (False, True):
        flat = torch.nn.Parameter(torch.zeros_like(atm_loop.flatten(model)))
        outer = torch.optim.SGD([flat], lr=0.7, momentum=0.8, nesterov=nesterov)

        def step(update, _round, flat=flat, outer=outer):
            before = flat.detach().clone()
            flat.grad = -update
            outer.step()
            return flat.detach() - before

        expected = atm_loop.run(
            model,
            stored_batches(data, 8),
            sorted(TASKS),
            rounds=4,
            make_optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            merge=atm_loop.mean,
            outer=step,
        )
        trainer = make_trainer(
            tmp_path / str(nesterov),
            copy.deepcopy(model),
            train_dataset=data,
            train_sampling_strategy="sequential",
            num_rounds=4,
            outer_learning_rate=0.7,
            outer_momentum=0.8,
            outer_nesterov=nesterov,
        )
        trainer.train()
        assert largest_difference(parameters_of(expected), parameters_of(trainer.model)) <= 1e-6


def test_one_full_batch_round_is_a_gradient_step(tmp_path):
    data = {task: make_data(task, 24) for task in TASKS}
    model = TinyModel()
    gradient = torch.zeros_like(atm_loop.flatten(model))
    for task in TASKS:
        copied = copy.deepcopy(model)
        copied(**data[task][:], task=task).loss.backward()
        gradient += torch.cat([p.grad.double().reshape(-1) for p in atm_loop.shared(copied)])
    expected = atm_loop.flatten(model) - 0.05 / len(TASKS) * gradient
    trainer = make_trainer(
        tmp_path, copy.deepcopy(model), train_dataset=data, num_rounds=1, full_batch=True, max_grad_norm=0.0
    )
    trainer.train()
    assert trainer.state.global_step == len(TASKS)
    assert (atm_loop.flatten(trainer.model) - expected).abs().max() <= 1e-6


def test_one_round_is_one_shot_task_arithmetic(tmp_path):
    model, data = TinyModel(), make_datasets()
    experts = []
    for task in sorted(TASKS):
        trainer = make_trainer(tmp_path / task, copy.deepcopy(model), train_dataset={task: data[task]}, num_rounds=1)
        trainer.train()
        experts.append(atm_loop.flatten(trainer.model) - atm_loop.flatten(model))
    trainer = make_trainer(
        tmp_path / "all",
        copy.deepcopy(model),
        train_dataset=data,
        num_rounds=1,
        merge_method="task_arithmetic",
        merge_kwargs={"scaling_coefficient": 0.4},
    )
    trainer.train()
    expected = atm_loop.flatten(model) + 0.4 * sum(experts)
    assert (atm_loop.flatten(trainer.model) - expected).abs().max() <= 1e-6


def test_mean_with_unit_step_is_the_parameter_average(tmp_path):
    trainer = make_trainer(tmp_path, num_rounds=1, keep_task_vectors=True)
    base = parameters_of(trainer.model)
    tuned = {}

    from hf_atm import ATMCallback

    class Watch(ATMCallback):
        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            tuned[task] = parameters_of(model)

    trainer.add_callback(Watch())
    trainer.train()
    for name in base:
        if name.startswith("heads."):
            continue
        average = torch.stack([tuned[task][name].double() for task in TASKS]).mean(0)
        assert (trainer.model.state_dict()[name] - average).abs().max() <= 1e-6
