"""Means weighted by AdamW's second moments, against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from hf_atm.moment_weights import entry_weights, entrywise_mean
from tests.reference import atm_loop
from tests.test_loop_oracle import stored_batches
from tests.testing_utils import TASKS, TinyModel, largest_difference, make_datasets, make_trainer, parameters_of


ADAMW = {"optim": "adamw_torch", "train_sampling_strategy": "sequential", "learning_rate": 0.01}


def plain_loop(model, exponent, rounds=2):
    """Tune with a fresh AdamW each, weigh every entry by its own squared gradients, average."""
    model, data = copy.deepcopy(model), make_datasets()
    for _ in range(rounds):
        start, vectors, weights, heads = atm_loop.flatten(model), [], [], {}
        for task in sorted(TASKS):
            tuned = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.01, weight_decay=0.0)
            for batch in stored_batches(data, 8)(0, task):
                optimizer.zero_grad()
                tuned(**batch, task=task).loss.backward()
                torch.nn.utils.clip_grad_norm_([p for p in tuned.parameters() if p.grad is not None], 1.0)
                optimizer.step()
            vectors.append(atm_loop.flatten(tuned) - start)
            roots = []
            for parameter in atm_loop.shared(tuned):
                state = optimizer.state[parameter]
                roots.append((state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))).sqrt().reshape(-1))
            weights.append((torch.cat(roots) + 1e-8) ** (2 * exponent))
            heads[task] = tuned.heads[task].state_dict()
        update = sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)
        atm_loop.unflatten(model, start + update)
        for task, state in heads.items():
            model.heads[task].load_state_dict(state)
    return model


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("keep", [False, True])
def test_matches_a_plain_loop(tmp_path, exponent, keep):
    model = TinyModel()
    expected = plain_loop(model, exponent)
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(model),
        num_rounds=2,
        moment_exponent=exponent,
        keep_task_vectors=keep,
        **ADAMW,
    )
    assert trainer.atm.rounds.streaming is not keep
    trainer.train()
    assert largest_difference(parameters_of(expected), parameters_of(trainer.model)) <= 1e-5
    plain = make_trainer(tmp_path / "plain", copy.deepcopy(model), num_rounds=2, **ADAMW)
    plain.train()
    assert largest_difference(parameters_of(plain.model), parameters_of(trainer.model)) > 1e-3


def test_equal_weights_give_the_plain_mean():
    generator = torch.Generator().manual_seed(0)
    vectors = [{"w": torch.randn(4, 3, generator=generator)} for _ in range(3)]
    same = [{"w": torch.full((4, 3), 0.3)}] * 3
    merged = entrywise_mean(vectors, same, [0.5, 0.25, 0.25])["w"]
    wanted = 0.5 * vectors[0]["w"] + 0.25 * (vectors[1]["w"] + vectors[2]["w"])
    assert torch.allclose(merged, wanted, atol=1e-6)


def test_an_entry_that_one_task_alone_moves_keeps_that_task_s_value():
    rows = torch.nn.Embedding(3, 2)
    vectors, weights = [], []
    for row in (0, 1):
        embedding = copy.deepcopy(rows)
        optimizer = torch.optim.AdamW(embedding.parameters(), lr=0.1, weight_decay=0.0)
        embedding(torch.tensor([row])).sum().backward()
        optimizer.step()
        vectors.append({"weight": (embedding.weight - rows.weight).detach()})
        weights.append(entry_weights(optimizer, {"weight": embedding.weight}, 0.5))
    merged = entrywise_mean(vectors, weights, [0.5, 0.5])["weight"]
    assert torch.allclose(merged[:2], torch.full((2, 2), -0.1), atol=1e-5)
    assert torch.equal(merged[2], torch.zeros(2))


def test_a_parameter_without_state_counts_like_one_without_gradients():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    assert torch.allclose(entry_weights(optimizer, {"p": parameter}, 0.5)["p"], torch.full((2,), 1e-8))


def test_an_optimizer_without_second_moments():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="SGD has none"):
        entry_weights(optimizer, {"p": parameter}, 0.5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("step", [7, 12])
def test_resumes_bit_by_bit(tmp_path, keep, step):
    settings = {
        "num_rounds": 2,
        "moment_exponent": 0.5,
        "keep_task_vectors": keep,
        "optimizer_policy": "per_task_second_moment",
        "outer_learning_rate": "norm",
        "save_strategy": "steps",
        "save_steps": step,
        **ADAMW,
    }
    whole = make_trainer(tmp_path, TinyModel(dropout=0.2), **settings)
    whole.train()
    again = make_trainer(tmp_path, TinyModel(dropout=0.2), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert largest_difference(parameters_of(whole.model), parameters_of(again.model)) == 0.0


def test_products_of_factors_have_no_moments(tmp_path):
    config = LoraConfig(r=2, target_modules=["body.0"])
    with pytest.raises(ValueError, match="of which AdamW knows nothing"):
        make_trainer(tmp_path, peft_config=config, moment_exponent=0.5, optim="adamw_torch")
    trainer = make_trainer(
        tmp_path, peft_config=config, moment_exponent=0.5, optim="adamw_torch", lora_merge_mode="adapter", num_rounds=1
    )
    trainer.train()
    assert len(trainer.report) == 1
