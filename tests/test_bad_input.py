"""Every wrong input ends in one sentence, before any training."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from transformers import TrainerCallback

from hf_atm import ATMCallback, ATMConfig
from hf_atm.rounds import DivergenceError
from tests.testing_utils import METRICS, TASKS, TinyModel, make_config, make_data, make_trainer, parameters_of


def small():
    return {task: make_data(task, 16) for task in TASKS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "average"}, r"average.*(known|registered|choose).*mean"),
        ({"merge_method": "dare"}, "density"),
        ({"merge_method": "ties", "merge_kwargs": {"density": 1.5}}, r"density.*1\.5"),
        ({"merge_method": "ties", "merge_kwargs": {"desnity": 0.2}}, r"desnity.*density"),
        ({"num_rounds": 0}, "num_rounds is 0"),
        ({"local_epochs": 0}, "local_epochs is 0"),
        ({"num_rounds": 2.5}, r"num_rounds is 2\.5"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"outer_learning_rate": "fast"}, "outer_learning_rate is 'fast'"),
        ({"outer_learning_rate": -1}, "outer_learning_rate is -1"),
        ({"outer_momentum": 1.0}, r"outer_momentum is 1\.0"),
        ({"max_task_vector_norm": 0}, "max_task_vector_norm is 0"),
        ({"task_weights": {"colour": -1.0, "shape": 1.0}}, r"task_weights\['colour'\] is -1\.0"),
        ({"task_weights": {"colour": "big"}}, r"task_weights\['colour'\] is 'big'"),
        ({"task_weights": {"colour": float("nan")}}, r"task_weights\['colour'\] is nan"),
        ({"task_weights": {"colour": 0, "shape": 0}}, "All task_weights are zero"),
        ({"moment_exponent": 1.5, "optim": "adamw_torch"}, r"moment_exponent is 1\.5"),
        ({"moment_exponent": 0.5}, "moment_exponent=0.5 needs AdamW's second moments, and optim=sgd"),
        (
            {"moment_exponent": 0.5, "optim": "adamw_torch", "merge_method": "tsv_m"},
            "moment_exponent=0.5 makes a weighted mean.*'tsv_m'",
        ),
        (
            {"moment_exponent": 0.5, "optim": "adamw_torch", "optimizer_policy": "keep"},
            "optimizer_policy='keep' mixes those of all tasks",
        ),
        ({"head_steps": float("inf")}, "head_steps is inf"),
        ({"head_steps": -1}, "head_steps is -1"),
        ({"head_steps": 1.5}, r"head_steps is 1\.5"),
        ({"head_steps": 2, "freeze_heads": True}, "head_steps=2 trains heads, and freeze_heads=True"),
        ({"head_steps": 2, "full_batch": True}, "head_steps=2 must be 0"),
        ({"head_learning_rate_ratio": 0}, "head_learning_rate_ratio is 0"),
        ({"loss_gap_temperature": 0}, "loss_gap_temperature is 0"),
        ({"task_vector_surgery": "cagrad"}, "task_vector_surgery is 'cagrad'.*pcgrad"),
        ({"task_vector_origin": "pretrained"}, "task_vector_origin is 'pretrained'"),
        ({"task_vector_origin": "start", "outer_momentum": 0.5}, "outer_momentum=0.5 adds up moves"),
        ({"task_weights": "size"}, "task_weights is 'size'"),
        ({"optimizer_policy": "forget"}, "optimizer_policy is 'forget'"),
        ({"lr_schedule_scope": "epoch"}, "lr_schedule_scope is 'epoch'"),
        ({"lora_merge_mode": "cat"}, "lora_merge_mode is 'cat'"),
        ({"task_parallel": True}, "task_parallel=True is not available yet"),
        ({"max_steps": 10}, "max_steps=10.*num_rounds"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"full_batch": True, "local_steps": 2}, "full_batch.*local_steps=2"),
        ({"full_batch": True, "local_epochs": 0.5}, r"local_epochs=0\.5"),
        (
            {
                "eval_strategy": "steps",
                "eval_steps": 5,
                "save_steps": 5,
                "load_best_model_at_end": True,
                "save_strategy": "steps",
            },
            "load_best_model_at_end needs eval_strategy='epoch'",
        ),
    ],
)
def test_settings(tmp_path, changes, message):
    with pytest.raises((ValueError, KeyError), match=message):
        make_config(tmp_path, **changes)


def test_schedules_that_follow_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        make_config(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")


def test_optimizers_whose_state_cannot_be_reached(tmp_path):
    with pytest.raises(ValueError, match="schedule_free.*second copy"):
        make_config(tmp_path, optim="schedule_free_adamw", optimizer_policy="keep")
    with pytest.raises(ValueError, match="optim=.*optimizer_policy='keep'"):
        make_config(tmp_path, optim="adalomo")


def test_deepspeed(tmp_path, monkeypatch):
    from hf_atm.config import check_host_arguments

    config = make_config(tmp_path)
    config.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed"):
        check_host_arguments(config)


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "a\\b"])
def test_task_names(tmp_path, name):
    with pytest.raises(ValueError, match="task name"):
        make_trainer(tmp_path, train_dataset={name: make_data("shape", 16)})


@pytest.mark.parametrize("wrong", [None, [], {}, make_data("shape", 4)])
def test_training_data_that_is_no_mapping(tmp_path, wrong):
    with pytest.raises(ValueError, match="train_dataset must map every task"):
        make_trainer(tmp_path, train_dataset=wrong)


def test_streamed_data_sets(tmp_path):
    data = small() | {"shape": make_data("shape", 16).to_iterable_dataset()}
    with pytest.raises(ValueError, match=r"train_dataset\['shape'\].*map-style"):
        make_trainer(tmp_path, train_dataset=data)


def test_empty_data_sets(tmp_path):
    empty = make_data("shape", 16).select([])
    with pytest.raises(ValueError, match=r"train_dataset\['shape'\] is empty"):
        make_trainer(tmp_path, train_dataset=small() | {"shape": empty})
    with pytest.raises(ValueError, match=r"eval_dataset\['shape'\] is empty"):
        make_trainer(tmp_path, train_dataset=small(), eval_dataset=small() | {"shape": empty})


@pytest.mark.parametrize("argument", ["eval_dataset", "compute_metrics", "data_collator"])
def test_keys_that_do_not_match(tmp_path, argument):
    values = {"eval_dataset": small(), "compute_metrics": dict(METRICS), "data_collator": dict.fromkeys(TASKS, len)}
    given = dict(values[argument])
    given["shap"] = given.pop("shape")
    message = rf"{argument} lacks \['shape'\] and has unknown \['shap'\]; the tasks are .*colour"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train_dataset=small(), **{argument: given})


def test_evaluation_without_data(tmp_path):
    with pytest.raises(ValueError, match="needs eval_dataset"):
        make_trainer(tmp_path, eval_strategy="epoch")
    with pytest.raises(ValueError, match="eval_experts=True needs eval_dataset"):
        make_trainer(tmp_path, eval_experts=True)
    with pytest.raises(ValueError, match="outer_learning_rate='search' needs eval_dataset"):
        make_trainer(tmp_path, outer_learning_rate="search")
    with pytest.raises(ValueError, match="task_weights='loss_gap' needs eval_dataset"):
        make_trainer(tmp_path, task_weights="loss_gap")


def test_segments_shorter_than_a_batch(tmp_path):
    data = small() | {"shape": make_data("shape", 5)}
    with pytest.raises(ValueError, match=r"'shape' has 5 examples x local_epochs=1 = 5.*batch of 8.*local_steps"):
        make_trainer(tmp_path, train_dataset=data)
    with pytest.raises(ValueError, match=r"'colour' has 16 examples x local_epochs=0\.2"):
        make_trainer(tmp_path, train_dataset=small(), local_epochs=0.2)
    with pytest.raises(ValueError, match="dataloader_drop_last=False"):
        make_trainer(tmp_path, train_dataset=data, local_steps=1, dataloader_drop_last=True)
    assert make_trainer(tmp_path, train_dataset=data, local_steps=1).atm.plan.lengths == (1, 1, 1)


def test_unequal_full_batches(tmp_path):
    data = small() | {"shape": make_data("shape", 24)}
    with pytest.raises(ValueError, match="full_batch needs every task.*'shape' has 24"):
        make_trainer(tmp_path, train_dataset=data, full_batch=True)


def test_task_weights_that_miss_a_task(tmp_path):
    with pytest.raises(KeyError, match=r"missing \['size'\], unknown \['smell'\]"):
        make_trainer(tmp_path, task_weights={"colour": 1, "shape": 1, "smell": 1})


def test_half_precision_weights(tmp_path):
    with pytest.raises(ValueError, match="torch.bfloat16.*dtype=torch.float32.*bf16=True"):
        make_trainer(tmp_path, TinyModel().to(torch.bfloat16))


def test_nothing_to_merge(tmp_path):
    model = TinyModel()
    model.body.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to merge"):
        make_trainer(tmp_path, model)


def test_task_specific_modules_without_a_place_for_them(tmp_path):
    with pytest.raises(ValueError, match="TinyModel.*MultiTaskModel.from_backbone"):
        make_trainer(tmp_path, task_specific_modules=["body.0"])


def poisoned(task):
    """A data set in which one label is infinite."""
    data = make_data("size", 16)
    labels = [float(value) for value in data["labels"][:]]
    labels[9] = math.inf
    columns = {"features": data["features"][:].tolist(), "labels": labels}
    return {**small(), task: datasets.Dataset.from_dict(columns).with_format("torch")}


@pytest.mark.parametrize("logging_steps", [1, 1000], ids=["seen in a log", "seen in the task vector"])
@pytest.mark.parametrize("filtered", [True, False])
def test_a_task_that_diverges_is_named_and_undone(tmp_path, logging_steps, filtered):
    kept = {}

    class Watch(ATMCallback):
        def on_round_end(self, args, state, control, *, model, **kwargs):
            kept.update(parameters_of(model))

        def on_task_begin(self, args, state, control, *, round, task, model, **kwargs):
            if round == 1 and task == "size":
                kept.update({name: v for name, v in parameters_of(model).items() if name.startswith("heads")})

    class Poison(TrainerCallback):
        """Makes the second round's labels bad."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.global_step:
                trainer.atm.round_dataset.datasets["size"] = poisoned("size")["size"]

    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        callbacks=[Watch(), Poison()],
        logging_steps=logging_steps,
        logging_nan_inf_filter=filtered,
    )
    with pytest.raises(DivergenceError, match="'size'.*The model holds the last merged weights again"):
        trainer.train()
    for name, value in parameters_of(trainer.model).items():
        assert torch.equal(value, kept[name]), name


def test_stopping_an_epoch_early(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    with pytest.raises(RuntimeError, match="should_epoch_stop"):
        make_trainer(tmp_path, callbacks=[Stop()]).train()


def test_unknown_field():
    with pytest.raises(TypeError, match="num_round"):
        ATMConfig(output_dir="x", num_round=3)


def test_adapters_whose_checkpoints_would_lack_something(tmp_path):
    from peft import LoraConfig

    adapter = {"peft_config": LoraConfig(r=2, target_modules=["body.0"])}
    with pytest.raises(ValueError, match="save_only_model=True.*lora_merge_mode='svd'"):
        make_trainer(tmp_path, save_only_model=True, save_strategy="epoch", **adapter)
    for mode in ("svd", "adapter"):
        with pytest.raises(ValueError, match="running statistics.*lora_merge_mode='delta'"):
            make_trainer(tmp_path, TinyModel(batch_norm=True), lora_merge_mode=mode, **adapter)


def test_an_interrupted_run_leaves_merged_weights_and_a_usable_trainer(tmp_path):
    class Interrupt(ATMCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

        def on_round_end(self, args, state, control, *, round, model, **kwargs):
            self.kept = parameters_of(model.body)

    interrupt = Interrupt()
    trainer = make_trainer(tmp_path, train_dataset=small(), callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(torch.equal(value, interrupt.kept[name]) for name, value in parameters_of(trainer.model.body).items())
    trainer.remove_callback(interrupt)
    trainer.train()
    assert len(trainer.report) == 3


def test_tasks_that_cannot_join(tmp_path):
    trainer = make_trainer(
        tmp_path, train_dataset={"colour": make_data("colour", 16)}, task_weights={"colour": 1.0}, num_rounds=1
    )
    with pytest.raises(ValueError, match="no head for 'smell'"):
        trainer.add_task("smell", make_data("shape", 16))
    with pytest.raises(ValueError, match="own eval_dataset"):
        trainer.add_task("shape", make_data("shape", 16), make_data("shape", 16))
    with pytest.raises(KeyError, match="task_weights"):
        trainer.add_task("shape", make_data("shape", 16))
    trainer.train()
    assert trainer.report[0]["tasks"] == ["colour"]


def test_a_run_that_fails_before_it_begins_leaves_the_weights_alone(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=small(), num_rounds=1)
    trainer.train()
    with torch.no_grad():
        trainer.model.body[0].weight.add_(1.0)
    kept = parameters_of(trainer.model)

    def fail(num_training_steps, optimizer=None):
        raise OSError("no scheduler today")

    trainer.create_scheduler = fail
    with pytest.raises(OSError, match="no scheduler today"):
        trainer.train()
    assert all(torch.equal(value, kept[name]) for name, value in parameters_of(trainer.model).items())
