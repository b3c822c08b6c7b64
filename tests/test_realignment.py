"""`align_every_round`: a task whose units change places merges as if they had not, and nothing else changes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import BertConfig, BertModel, TrainerCallback

from hf_atm import MultiTaskModel
from hf_atm.alignment import Flat, Permutation, PermutationSpec, register_permutation_spec, spec_for
from hf_atm.merge_report import DivergenceError

from .testing_utils import (
    TASKS,
    TinyModel,
    largest_difference,
    make_config,
    make_datasets,
    make_trainer,
    parameters_of,
)


def spec(config, names):
    axes = {
        "body.0.weight": ("P", None),
        "body.0.bias": ("P",),
        "body.2.weight": ("Q", "P"),
        "body.2.bias": ("Q",),
        **{f"norm.{leaf}": ("Q",) for leaf in ("weight", "bias", "running_mean", "running_var")},
        "heads.*.weight": (None, "Q"),
        "heads.*.bias": (None,),
    }
    optional = [pattern for pattern in axes if pattern.startswith(("norm", "heads"))]
    return PermutationSpec({"P": Flat(12), "Q": Flat(8)}, axes, ("heads.*",), optional)


register_permutation_spec("tiny-network-of-tests", spec, overwrite=True)


def tiny(**options):
    model = TinyModel(**options)
    model.config = SimpleNamespace(model_type="tiny-network-of-tests")
    return model


class Reorder(TrainerCallback):
    """After one task's last step in a round, its whole model with the units in a random order."""

    def __init__(self, task="shape", round_index=0):
        self.task, self.round_index, self.done = task, round_index, 0

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        plan = self.trainer.atm.plan
        segment = plan.closed_by(state.global_step + 1)
        if segment is None or (segment.task, segment.round) != (self.task, self.round_index) or segment.settling:
            return
        live = model.state_dict()
        body = {name: value for name, value in live.items() if ".".join(name.split(".")[:2]) not in self.others}
        order = Permutation.random(spec_for(model), 5)
        moved = order.apply(body)
        with torch.no_grad():
            for name, value in moved.items():
                live[name].copy_(value)
            for name, parameter in model.named_parameters():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    if name in body and slot.startswith("exp_avg"):
                        value.copy_(order.apply({name: value})[name])
        if hasattr(model, "forget_active_task"):
            # What is live is now stale; the stored copies were reordered.
            task = model.active_task
            model.forget_active_task()
            if task is not None:
                model.activate_task(task)
        self.done += 1

    @property
    def others(self):
        return {f"{kind}.{task}" for kind in ("heads", "task_specific") for task in TASKS if task != self.task}


def run(tmp_path, model, reorder=None, **changes):
    callbacks = [] if reorder is None else [reorder]
    trainer = make_trainer(tmp_path, copy.deepcopy(model), callbacks=callbacks, **changes)
    if reorder is not None:
        reorder.trainer = trainer
    trainer.train()
    assert reorder is None or reorder.done == 1
    return trainer


VARIANTS = {
    "mean": {},
    "batch norm": {"batch_norm": True},
    "ties": {"merge_method": "ties", "merge_kwargs": {"density": 0.5}},
    "from the start": {"task_vector_origin": "start", "outer_learning_rate": 1.2},
    "momentum and clipping": {"outer_momentum": 0.5, "max_task_vector_norm": "mean"},
    "weighted by moments": {"moment_exponent": 0.5, "optim": "adamw_torch", "learning_rate": 0.01},
    "settling heads": {"head_steps": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reordered_task_merges_as_if_it_had_not_been(variant, tmp_path):
    changes = dict(VARIANTS[variant])
    model = tiny(batch_norm=changes.pop("batch_norm", False))
    plain = run(tmp_path / "plain", model, **changes)
    found = run(tmp_path / "found", model, Reorder(), align_every_round=True, **changes)
    assert largest_difference(parameters_of(found.model), parameters_of(plain.model)) < 1e-5
    moved = [record["moved_units"] for record in found.report]
    assert moved[0]["shape"] > 10 and moved[0]["colour"] == moved[0]["size"] == 0
    assert set(moved[1].values()) == {0}
    lost = run(tmp_path / "lost", model, Reorder(), **changes)
    assert largest_difference(parameters_of(lost.model), parameters_of(plain.model)) > 1e-2


def test_an_ordinary_run_is_left_as_it_is_bit_by_bit(tmp_path):
    model = tiny(batch_norm=True)
    plain = run(tmp_path / "plain", model, keep_task_vectors=True)
    aligned = run(tmp_path / "aligned", model, keep_task_vectors=True, align_every_round=True)
    assert largest_difference(parameters_of(aligned.model), parameters_of(plain.model)) == 0
    assert all(record["moved_units"] == dict.fromkeys(TASKS, 0) for record in aligned.report)
    assert all(record["moved_units"] == {} for record in plain.report)


def encoder(**options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=16,
    )
    tasks = {task: {"num_labels": labels} for task, labels in TASKS.items()}
    model = MultiTaskModel.from_backbone(BertModel(config), tasks=tasks, seed=0)
    if options.get("own"):
        model.add_task_specific_modules(options["own"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def texts():
    generator = torch.Generator().manual_seed(3)
    data = {}
    for task, dataset in make_datasets().items():
        ids = torch.randint(0, 30, (len(dataset), 5), generator=generator)
        data[task] = dataset.remove_columns("features").add_column("input_ids", ids.tolist()).with_format("torch")
    return data


@pytest.mark.parametrize("own", [None, ["LayerNorm", "intermediate.dense"]], ids=["shared", "own modules"])
def test_heads_and_own_modules_of_a_transformer_are_reordered_along(own, tmp_path):
    model, data = encoder(own=own), texts()
    changes = {"train_dataset": data, "num_rounds": 2}
    plain = run(tmp_path / "plain", model, **changes)
    found = run(tmp_path / "found", model, Reorder(), align_every_round=True, **changes)
    assert found.report[0]["moved_units"]["shape"] > 10
    assert largest_difference(parameters_of(found.model), parameters_of(plain.model)) < 1e-4


def test_neither_the_order_of_tasks_nor_an_interruption_changes_it(tmp_path):
    model = tiny()
    whole = run(tmp_path / "whole", model, Reorder(), align_every_round=True)
    turned = run(
        tmp_path / "turned",
        model,
        Reorder(),
        align_every_round=True,
        train_dataset=dict(reversed(make_datasets().items())),
    )
    assert largest_difference(parameters_of(turned.model), parameters_of(whole.model)) == 0
    run(tmp_path / "saved", model, Reorder(), align_every_round=True, save_strategy="steps", save_steps=9)
    resumed = make_trainer(
        tmp_path / "saved", copy.deepcopy(model), align_every_round=True, save_strategy="steps", save_steps=9
    )
    # Past the reordered segment, before the merge.
    resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-9"))
    assert resumed.report[0]["moved_units"]["shape"] > 10
    assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0
    with pytest.raises(ValueError, match="align_every_round: True -> False"):
        make_trainer(tmp_path / "saved", copy.deepcopy(model)).train(
            resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-9")
        )


def test_a_merge_that_diverges_leaves_heads_in_the_order_of_the_base(tmp_path, monkeypatch):
    model, reorder = tiny(), Reorder(task="colour")
    trainer = make_trainer(tmp_path, copy.deepcopy(model), callbacks=[reorder], align_every_round=True)
    reorder.trainer = trainer

    def diverge(*arguments, **keywords):
        seen.append(trainer.model.heads["colour"].weight.detach().clone())
        raise DivergenceError("no")

    seen = []
    before = {}
    apply = trainer.atm.rounds.__class__.tuned
    monkeypatch.setattr(trainer.atm.rounds.__class__, "merge", diverge)
    monkeypatch.setattr(
        trainer.atm.rounds.__class__,
        "tuned",
        lambda self, task: (
            before.setdefault("head", trainer.model.heads["colour"].weight.detach().clone()) is None
            or apply(self, task)
        ),
    )
    with pytest.raises(DivergenceError):
        trainer.train()
    assert not torch.equal(seen[0], before["head"])
    assert torch.equal(trainer.model.heads["colour"].weight, before["head"])


def test_bad_settings_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="align_every_round is 'yes'; choose True or False"):
        make_config(tmp_path, align_every_round="yes")
    with pytest.raises(ValueError, match="optimizer_policy='per_task' keeps moments"):
        make_config(tmp_path, align_every_round=True, optimizer_policy="per_task")
    with pytest.raises(ValueError, match="a TinyModel has no config.model_type"):
        make_trainer(tmp_path, TinyModel(), align_every_round=True)
    unknown = TinyModel()
    unknown.config = SimpleNamespace(model_type="unheard-of")
    with pytest.raises(KeyError, match="register_permutation_spec"):
        make_trainer(tmp_path, unknown, align_every_round=True)
    frozen = tiny()
    frozen.body[2].requires_grad_(False)
    with pytest.raises(ValueError, match="'body.2.weight', which is frozen"):
        make_trainer(tmp_path, frozen, align_every_round=True)
    lora = LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="adapters of one base share its order of units"):
        make_trainer(tmp_path, encoder(), peft_config=lora, train_dataset=texts(), align_every_round=True)


def test_a_frozen_head_may_stay(tmp_path):
    model = tiny()
    plain = run(tmp_path / "plain", model, freeze_heads=True)
    found = run(tmp_path / "found", model, Reorder(), freeze_heads=True, align_every_round=True)
    assert largest_difference(parameters_of(found.model), parameters_of(plain.model)) < 1e-5
