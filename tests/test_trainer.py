"""What users of the trainer see: events, evaluation, logs, options."""

from __future__ import annotations

import copy
import dataclasses
import math

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_atm import ATMCallback, ATMConfig, ATMMixin, ATMTrainer, TaskDataset
from tests.testing_utils import (
    METRICS,
    TASKS,
    TinyModel,
    accuracy,
    largest_difference,
    make_config,
    make_data,
    make_datasets,
    make_trainer,
    parameters_of,
)


SIZES = {"colour": 24, "shape": 16, "size": 16}


def small(size=None):
    return {task: make_data(task, size or SIZES[task]) for task in SIZES}


class Listener(ATMCallback):
    def __init__(self):
        self.events = []

    def on_round_begin(self, args, state, control, *, round, **kwargs):
        self.events.append(("round_begin", round))

    def on_task_begin(self, args, state, control, *, round, task, **kwargs):
        self.events.append(("task_begin", round, task))

    def on_task_end(self, args, state, control, *, round, task, task_vector_norm, **kwargs):
        assert task_vector_norm > 0
        self.events.append(("task_end", round, task))

    def on_round_end(self, args, state, control, *, round, report, **kwargs):
        assert set(kwargs) >= {"model", "optimizer", "lr_scheduler", "train_dataloader", "processing_class"}
        assert report.round == round and report.merged_norm > 0
        self.events.append(("round_end", round))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("evaluate", "eval_average" in metrics))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))


def test_events_come_in_order_beside_ordinary_callbacks(tmp_path):
    listener = Listener()
    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        eval_dataset=small(8),
        compute_metrics=METRICS,
        callbacks=[TrainerCallback(), listener],
        num_rounds=2,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer.train()
    one_round = [
        [("round_begin", r)]
        + [event for task in sorted(TASKS) for event in (("task_begin", r, task), ("task_end", r, task))]
        + [("round_end", r), ("evaluate", True), ("save", 7 * (r + 1))]
        for r in range(2)
    ]
    assert listener.events == one_round[0] + one_round[1]


def test_an_event_can_stop_the_run(tmp_path):
    class Stop(ATMCallback):
        def on_round_end(self, args, state, control, *, round, **kwargs):
            control.should_training_stop = round == 1
            return control

    trainer = make_trainer(tmp_path, train_dataset=small(), callbacks=[Stop()], num_rounds=5)
    trainer.train()
    assert len(trainer.report) == 2


def test_evaluation_is_one_log_with_every_task(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=small(), eval_dataset=small(10), compute_metrics=METRICS)
    metrics = trainer.evaluate()
    model, expected = trainer.model.eval(), {}
    for task in TASKS:
        columns = make_data(task, 10)[:]
        with torch.no_grad():
            logits = model(columns["features"], task=task).logits
        if TASKS[task] == 1:
            expected[task] = -float((logits.squeeze(1) - columns["labels"]).square().mean())
        else:
            expected[task] = float((logits.argmax(1) == columns["labels"]).float().mean())
    assert metrics["eval_colour_accuracy"] == pytest.approx(expected["colour"])
    assert metrics["eval_size_fit"] == pytest.approx(expected["size"], rel=1e-5)
    assert metrics["eval_average"] == pytest.approx(sum(expected.values()) / 3)
    assert metrics["eval_worst"] == pytest.approx(min(expected.values()))
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{task}_loss"] for task in TASKS) / 3)
    assert len(trainer.state.log_history) == 1
    partial = trainer.evaluate({"shape": make_data("shape", 10)}, metric_key_prefix="test")
    assert partial["test_shape_accuracy"] == metrics["eval_shape_accuracy"] == partial["test_average"]
    with pytest.raises(KeyError, match="unknown tasks"):
        trainer.evaluate({"smell": make_data("shape", 10)})
    predicted = trainer.predict(TaskDataset(make_data("shape", 10), "shape"))
    assert predicted.metrics["test_accuracy"] == metrics["eval_shape_accuracy"]


def test_best_model_and_early_stopping_follow_the_average(tmp_path):
    class Spoil(ATMCallback):
        """Breaks the heads from the third round on."""

        def on_round_end(self, args, state, control, *, round, model, **kwargs):
            if round >= 2:
                with torch.no_grad():
                    model.heads["shape"].weight.neg_()
                    model.heads["shape"].bias.neg_()

    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        eval_dataset=small(16),
        compute_metrics={**METRICS, "size": lambda prediction: {"constant": 0.0}},
        callbacks=[Spoil(), EarlyStoppingCallback(early_stopping_patience=1)],
        num_rounds=8,
        learning_rate=0.3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_average",
        save_total_limit=1,
    )
    trainer.train()
    assert 3 <= len(trainer.report) < 8
    averages = [entry["eval_average"] for entry in trainer.state.log_history if "eval_average" in entry]
    assert trainer.evaluate()["eval_average"] == pytest.approx(max(averages))
    assert trainer.state.best_model_checkpoint.startswith(str(tmp_path / "checkpoint-"))


@pytest.mark.parametrize(("mode", "only_model"), [("delta", False), ("svd", False), ("svd", True)])
def test_the_best_lora_model_comes_back_with_its_base_weights_and_experts(tmp_path, mode, only_model):
    from peft import LoraConfig

    class Spoil(ATMCallback):
        def on_round_end(self, args, state, control, *, round, model, **kwargs):
            if round == 0:
                self.kept = parameters_of(model)
                trainer.save_model(str(tmp_path / "first"))

    spoil = Spoil()
    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        eval_dataset=small(8),
        compute_metrics=METRICS,
        callbacks=[spoil],
        peft_config=LoraConfig(r=2, target_modules=["body.0"]),
        lora_merge_mode=mode,
        save_only_model=only_model,
        num_rounds=3,
        learning_rate=0.3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_runtime_rank",
    )
    scores = iter([1.0, 0.5, 0.2])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_runtime_rank": next(scores)}
    trainer.args.greater_is_better = True
    trainer.train()
    assert largest_difference(parameters_of(trainer.model), spoil.kept) == 0.0
    trainer.save_model(str(tmp_path / "best"))
    if only_model:  # such checkpoints hold no experts, and those of the last round are not this model's
        assert not (tmp_path / "best" / "adapters" / "colour").exists()
        return
    for task in TASKS:
        best, first = (
            load_file(tmp_path / folder / "adapters" / task / "adapter_model.safetensors")
            for folder in ("best", "first")
        )
        assert largest_difference(best, first) == 0.0


def test_logs_name_round_and_task(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=small(), num_rounds=2, logging_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["task"] for entry in logs] == [0, 0, 0, 1, 1, 2, 2] * 2
    assert [entry["round"] for entry in logs] == [0] * 7 + [1] * 7
    assert all(entry[f"loss_{sorted(TASKS)[entry['task']]}"] == entry["loss"] for entry in logs)
    colour = [entry["loss"] for entry in logs if entry["task"] == 0][:3]
    assert trainer.report[0]["losses"]["colour"] == pytest.approx(sum(colour) / 3)


def test_the_record_of_a_round(tmp_path):
    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        eval_dataset=small(8),
        compute_metrics=METRICS,
        num_rounds=1,
        eval_strategy="epoch",
        eval_experts=True,
        keep_task_vectors=True,
        round_table=True,
    )
    trainer.train()
    (record,) = trainer.report
    assert record["tasks"] == sorted(TASKS) and record["method"] == "mean"
    assert record["scores"]["shape"] == record["metrics"]["eval_shape_accuracy"]
    assert set(record["experts"]) == set(TASKS) and "accuracy" in record["experts"]["shape"]
    assert record["expert_scores"]["shape"] == record["experts"]["shape"]["accuracy"]
    assert record["cosines"]["shape"]["shape"] == pytest.approx(1)
    assert record["cosines"]["shape"]["size"] == record["cosines"]["size"]["shape"]
    assert all(record["seconds"][name] > 0 for name in ("tuning", "merging", "evaluating"))


def test_the_round_table(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        eval_dataset=small(8),
        compute_metrics=METRICS,
        num_rounds=1,
        eval_strategy="epoch",
        eval_experts=True,
        round_table=True,
    )
    trainer.train()
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "Round 1/1  mean" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  shape ")]
    record = trainer.report[0]
    assert f"{record['scores']['shape']:.4f}" in line and f"{record['expert_scores']['shape']:.4f}" in line
    assert any(line.startswith("  average") for line in text.splitlines())


@pytest.mark.parametrize("streaming", [True, False])
def test_cosines_of_small_vectors_are_exact(tmp_path, streaming):
    vectors = {}

    class Watch(ATMCallback):
        def on_task_begin(self, args, state, control, *, model, **kwargs):
            self.base = parameters_of(model.body)

        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            state = parameters_of(model.body)
            vectors[task] = torch.cat([(state[n] - self.base[n]).double().reshape(-1) for n in sorted(state)])

    trainer = make_trainer(
        tmp_path, train_dataset=small(), callbacks=[Watch()], num_rounds=1, keep_task_vectors=not streaming
    )
    trainer.train()
    report = trainer.report[0]
    assert report["cosines_exact"]
    for first in TASKS:
        assert report["task_vector_norms"][first] == pytest.approx(float(vectors[first].norm()), rel=1e-6)
        for second in TASKS:
            cosine = torch.nn.functional.cosine_similarity(vectors[first], vectors[second], dim=0)
            assert report["cosines"][first][second] == pytest.approx(float(cosine), abs=1e-6)


def test_task_vectors_are_there_when_kept(tmp_path):
    seen = {}

    class Watch(ATMCallback):
        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            seen[task] = list(trainer.task_vectors)

    trainer = make_trainer(tmp_path, train_dataset=small(), callbacks=[Watch()], num_rounds=1, keep_task_vectors=True)
    trainer.train()
    assert seen == {"colour": ["colour"], "shape": ["colour", "shape"], "size": ["colour", "shape", "size"]}
    assert set(trainer.base_state) == {name for name in trainer.model.state_dict() if name.startswith("body")}
    with pytest.raises(RuntimeError, match="keep_task_vectors=True"):
        _ = make_trainer(tmp_path / "sum").task_vectors


def test_the_order_of_tasks_changes_nothing(tmp_path):
    forward = make_trainer(tmp_path / "a", TinyModel(dropout=0.3), train_dataset=small())
    forward.train()
    backward = make_trainer(
        tmp_path / "b", TinyModel(dropout=0.3), train_dataset=dict(reversed(list(small().items())))
    )
    backward.train()
    assert largest_difference(parameters_of(forward.model), parameters_of(backward.model)) == 0.0


def test_identical_tasks_merge_to_the_single_one(tmp_path):
    data = make_data("shape", 16)
    pair = make_trainer(
        tmp_path / "pair",
        TinyModel({"one": 2, "two": 2}),
        train_dataset={"one": data, "two": data},
        train_sampling_strategy="sequential",
    )
    # The same head for both, so that the tasks are the same task.
    pair.model.heads["two"].load_state_dict(pair.model.heads["one"].state_dict())
    single = make_trainer(
        tmp_path / "single", TinyModel({"one": 2}), train_dataset={"one": data}, train_sampling_strategy="sequential"
    )
    single.model.load_state_dict({n: v for n, v in pair.model.state_dict().items() if "two" not in n})
    pair.train(), single.train()
    assert largest_difference(parameters_of(pair.model.body), parameters_of(single.model.body)) <= 1e-6


def test_one_task_with_kept_state_is_plain_training(tmp_path):
    data = make_data("shape", 32)
    model = TinyModel({"shape": 2})
    loop = make_trainer(
        tmp_path / "loop",
        copy.deepcopy(model),
        train_dataset={"shape": data},
        train_sampling_strategy="sequential",
        optimizer_policy="keep",
        optim="adamw_torch",
        learning_rate=0.01,
        num_rounds=3,
    )
    loop.train()
    arguments = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    values = {name: value for name, value in make_config(tmp_path).to_dict().items() if name in arguments}
    values |= {"output_dir": str(tmp_path / "plain"), "num_train_epochs": 3, "optim": "adamw_torch"}
    values |= {"learning_rate": 0.01, "train_sampling_strategy": "sequential"}
    plain = Trainer(
        copy.deepcopy(model),
        TrainingArguments(**values),
        train_dataset=[{**row, "task": "shape"} for row in data],
        data_collator=lambda rows: {
            "features": torch.stack([row["features"] for row in rows]),
            "labels": torch.stack([row["labels"] for row in rows]),
            "task": "shape",
        },
    )
    plain.train()
    assert largest_difference(parameters_of(loop.model), parameters_of(plain.model)) <= 1e-6


class Rates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_schedules_restart_with_each_segment_or_span_the_run(tmp_path):
    segment, run = Rates(), Rates()
    for rates, scope in ((segment, "segment"), (run, "run")):
        make_trainer(
            tmp_path / scope,
            train_dataset=small(),
            callbacks=[rates],
            num_rounds=2,
            lr_scheduler_type="linear",
            lr_schedule_scope=scope,
            learning_rate=1.0,
        ).train()
    assert segment.rates == pytest.approx([1, 2 / 3, 1 / 3, 1, 0.5, 1, 0.5] * 2)
    assert run.rates == pytest.approx(
        [1, 5 / 6, 4 / 6, 1, 3 / 4, 1, 3 / 4, 3 / 6, 2 / 6, 1 / 6, 2 / 4, 1 / 4, 2 / 4, 1 / 4]
    )


def test_a_skipped_step_delays_no_later_segment(tmp_path):
    rates = Rates()
    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        callbacks=[rates],
        num_rounds=1,
        lr_scheduler_type="linear",
        learning_rate=1.0,
    )

    class Skip(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler, **kwargs):
            pass

        def on_optimizer_step(self, args, state, control, lr_scheduler, **kwargs):
            if state.global_step == 1:  # as gradient scaling does: this step leaves the schedule where it was
                lr_scheduler.last_epoch -= 1

    trainer.add_callback(Skip())
    trainer.train()
    assert rates.rates[3:] == pytest.approx([1, 0.5, 1, 0.5])
    assert rates.rates[2] == pytest.approx(2 / 3)


@pytest.mark.parametrize("policy", ["reset", "keep", "per_task", "per_task_second_moment"])
def test_what_the_optimizer_remembers(tmp_path, policy):
    seen = []

    class Watch(ATMCallback):
        def on_task_begin(self, args, state, control, *, task, model, optimizer, **kwargs):
            slots = optimizer.state.get(model.body[0].weight, {})
            seen.append((task, int(slots["step"]) if slots else 0, bool(slots) and bool(slots["exp_avg"].any())))

    make_trainer(
        tmp_path,
        train_dataset=small(),
        callbacks=[Watch()],
        num_rounds=2,
        optimizer_policy=policy,
        optim="adamw_torch",
    ).train()
    first = [("colour", 0, False), ("shape", 0, False), ("size", 0, False)]
    expected = {
        "reset": first * 2,
        "keep": [
            ("colour", 0, False),
            ("shape", 3, True),
            ("size", 5, True),
            ("colour", 7, True),
            ("shape", 10, True),
            ("size", 12, True),
        ],
        "per_task": first + [("colour", 3, True), ("shape", 2, True), ("size", 2, True)],
        "per_task_second_moment": first + [("colour", 3, False), ("shape", 2, False), ("size", 2, False)],
    }
    assert seen == expected[policy]


@pytest.mark.parametrize("head_steps", [0, 1])
def test_shared_moments_are_the_mean_of_the_tasks(tmp_path, head_steps):
    """Every task of a round starts from the mean of what the last round's left, and its head from its own."""
    begun, ended = [], []

    def slots(model, optimizer, task):
        state = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
        names = [name for name in state if name.startswith("body") or name.startswith(f"heads.{task}")]
        return {(name, key): value.clone() for name in names for key, value in state[name].items()}

    class Watch(ATMCallback):
        def on_task_begin(self, args, state, control, *, task, model, optimizer, **kwargs):
            begun.append((task, slots(model, optimizer, task)))

        def on_task_end(self, args, state, control, *, task, model, optimizer, **kwargs):
            ended.append((task, slots(model, optimizer, task)))

    make_trainer(
        tmp_path, train_dataset=small(), callbacks=[Watch()], num_rounds=3, optimizer_policy="shared",
        optim="adamw_torch", head_steps=head_steps,
    ).train()  # fmt: skip
    assert all(not state for _, state in begun[:3])
    for round_index in (1, 2):
        before = ended[3 * (round_index - 1) : 3 * round_index]
        for task, state in begun[3 * round_index : 3 * round_index + 3]:
            for key in ("exp_avg", "exp_avg_sq", "step"):
                mean = sum(left["body.0.weight", key].double() for _, left in before) / 3
                assert torch.allclose(state["body.0.weight", key].double(), mean, rtol=1e-6, atol=1e-8)
            own = dict(before)[task][f"heads.{task}.weight", "step"]
            assert state[f"heads.{task}.weight", "step"] == own + head_steps


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ("num_examples", {"colour": 24 / 56, "shape": 16 / 56, "size": 16 / 56}),
        ({"colour": 1, "shape": 0, "size": 3}, {"colour": 0.25, "shape": 0.0, "size": 0.75}),
    ],
)
def test_task_weights(tmp_path, spec, weights):
    tuned = {}

    class Watch(ATMCallback):
        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            tuned[task] = parameters_of(model.body)

    trainer = make_trainer(tmp_path, train_dataset=small(), callbacks=[Watch()], num_rounds=1, task_weights=spec)
    trainer.train()
    for name, value in parameters_of(trainer.model.body).items():
        expected = sum(weight * tuned[task][name].double() for task, weight in weights.items())
        assert (value - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("limit", [0.05, "mean"])
def test_long_task_vectors_are_clipped(tmp_path, limit):
    class Watch(ATMCallback):
        def on_round_begin(self, args, state, control, *, model, **kwargs):
            self.base, self.vectors = parameters_of(model.body), {}

        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            state = parameters_of(model.body)
            self.vectors[task] = {name: (state[name] - self.base[name]).double() for name in state}

    watch = Watch()
    trainer = make_trainer(
        tmp_path, train_dataset=small(), callbacks=[watch], num_rounds=1, max_task_vector_norm=limit
    )
    trainer.train()
    norms = {t: math.sqrt(sum(float(v.square().sum()) for v in vs.values())) for t, vs in watch.vectors.items()}
    bound = sum(norms.values()) / 3 if limit == "mean" else limit
    assert any(norm > bound for norm in norms.values())
    for name, value in parameters_of(trainer.model.body).items():
        clipped = [watch.vectors[task][name] * min(1, bound / norms[task]) for task in TASKS]
        assert (value - watch.base[name] - torch.stack(clipped).mean(0)).abs().max() <= 1e-6


def test_the_norm_rule_restores_the_size_of_a_step(tmp_path):
    for folder, changes in (("outer", {"outer_learning_rate": "norm"}), ("scale", {})):
        kwargs = {"scaling_coefficient": "norm"} if folder == "scale" else {}
        trainer = make_trainer(tmp_path / folder, train_dataset=small(), num_rounds=1, merge_kwargs=kwargs, **changes)
        before = parameters_of(trainer.model.body)
        trainer.train()
        after = parameters_of(trainer.model.body)
        moved = math.sqrt(sum(float((after[n] - before[n]).double().square().sum()) for n in after))
        norms = trainer.report[0]["task_vector_norms"].values()
        assert moved == pytest.approx(math.sqrt(sum(norm**2 for norm in norms) / 3), rel=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "breadcrumbs", "dare_ties", "dare"])
def test_every_other_method_runs_in_the_loop(tmp_path, method):
    from hf_atm.merging import merge_task_vectors

    kwargs = {"density": 0.5} if "dare" in method or method == "breadcrumbs" else {}
    seen = {}

    class Watch(ATMCallback):
        def on_task_end(self, args, state, control, **kwargs):
            seen.update({task: dict(vector) for task, vector in trainer.task_vectors.items()})

    trainer = make_trainer(
        tmp_path,
        train_dataset=small(),
        num_rounds=1,
        merge_method=method,
        merge_kwargs=kwargs,
        outer_learning_rate=0.5,
        callbacks=[Watch()],
    )
    before = parameters_of(trainer.model)
    trainer.train()
    merged = merge_task_vectors([seen[t] for t in sorted(TASKS)], method=method, names=sorted(TASKS), **kwargs)
    for name, update in merged.items():
        assert (trainer.model.state_dict()[name] - before[name] - 0.5 * update).abs().max() <= 1e-6


def test_frozen_heads_stay_as_given(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=small(), freeze_heads=True)
    before = parameters_of(trainer.model)
    trainer.train()
    after = parameters_of(trainer.model)
    assert (
        largest_difference(
            {n: v for n, v in before.items() if "heads" in n}, {n: v for n, v in after.items() if "heads" in n}
        )
        == 0.0
    )
    assert not torch.equal(before["body.0.weight"], after["body.0.weight"])


def test_batch_normalisation_statistics_are_pooled_each_round(tmp_path):
    seen = {}

    class Watch(ATMCallback):
        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            seen[task] = {name: value.clone() for name, value in model.norm.named_buffers()}

    trainer = make_trainer(
        tmp_path, TinyModel(batch_norm=True), train_dataset=small(), num_rounds=1, callbacks=[Watch()]
    )
    trainer.train()
    means = torch.stack([seen[task]["running_mean"].double() for task in TASKS])
    variances = torch.stack([seen[task]["running_var"].double() for task in TASKS])
    norm = trainer.model.norm
    assert (norm.running_mean - means.mean(0)).abs().max() <= 1e-6
    pooled = (variances + means**2).mean(0) - means.mean(0) ** 2
    assert (norm.running_var - pooled).abs().max() <= 1e-6
    assert int(norm.num_batches_tracked) == 3


def test_workers_read_the_same_data(tmp_path):
    alone = make_trainer(tmp_path / "alone", train_dataset=small(), num_rounds=2)
    alone.train()
    helped = make_trainer(tmp_path / "helped", train_dataset=small(), num_rounds=2, dataloader_num_workers=1)
    helped.train()
    assert largest_difference(parameters_of(alone.model), parameters_of(helped.model)) == 0.0


def test_collators_and_extra_columns(tmp_path):
    used = set()

    def collator(task):
        def collate(rows):
            used.add(task)
            assert all("comment" not in row for row in rows)
            return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

        return collate

    data = {task: dataset.add_column("comment", ["x"] * len(dataset)) for task, dataset in small().items()}
    trainer = make_trainer(
        tmp_path, train_dataset=data, data_collator={task: collator(task) for task in TASKS}, num_rounds=1
    )
    trainer.train()
    assert used == set(TASKS)


def test_a_plain_torch_data_set_will_do(tmp_path):
    rows = {task: [dict(row, comment=1) for row in dataset] for task, dataset in small().items()}
    plain = make_trainer(tmp_path / "rows", train_dataset=rows)
    plain.train()
    usual = make_trainer(tmp_path / "usual", train_dataset=small())
    usual.train()
    assert largest_difference(parameters_of(plain.model), parameters_of(usual.model)) == 0.0


def test_a_task_joins_between_runs(tmp_path):
    data = small()
    first = {task: data[task] for task in ("colour", "shape")}
    trainer = make_trainer(tmp_path, train_dataset=first, num_rounds=1)
    trainer.train()
    before = parameters_of(trainer.model)
    trainer.add_task("size", data["size"])
    trainer.train()
    assert trainer.report[-1]["tasks"] == ["colour", "shape", "size"]
    assert not torch.equal(trainer.model.heads["size"].weight, before["heads.size.weight"])
    with pytest.raises(ValueError, match="already"):
        trainer.add_task("size", data["size"])


def test_settings_parse_from_the_command_line_and_replace(tmp_path):
    (config,) = HfArgumentParser(ATMConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--num_rounds",
            "4",
            "--merge_method",
            "ties",
            "--merge_kwargs",
            '{"density": 0.3}',
            "--outer_learning_rate",
            "1.5",
            "--task_weights",
            '{"a": 2, "b": 1}',
            "--max_task_vector_norm",
            "mean",
            "--task_specific_modules",
            "norm*",
            "bias",
        ]
    )
    assert config.num_train_epochs == 4.0
    assert config.merge_kwargs == {"density": 0.3} and config.task_weights == {"a": 2, "b": 1}
    assert config.outer_learning_rate == 1.5 and config.max_task_vector_norm == "mean"
    assert config.task_specific_modules == ["norm*", "bias"]
    assert dataclasses.replace(config, num_rounds=7).num_train_epochs == 7.0
    assert all(field.metadata.get("help") for field in dataclasses.fields(ATMConfig) if field.name in vars(config))


def test_the_loop_refuses_hosts_that_read_data_their_own_way(tmp_path):
    class Odd(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return None

    class ATMOdd(ATMMixin, Odd):
        pass

    with pytest.raises(TypeError, match="_get_train_sampler comes from Odd"):
        ATMOdd(TinyModel(), make_config(tmp_path), train_dataset=small())
    with pytest.raises(ValueError, match="needs args with the loop's settings, got TrainingArguments"):
        ATMTrainer(TinyModel(), TrainingArguments(str(tmp_path)), train_dataset=small())


def test_a_model_card_can_be_written(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2, 3]] * 8})
    trainer = make_trainer(
        tmp_path, LlamaForCausalLM(config), train_dataset={"a": ids, "b": ids}, num_rounds=1, callbacks=[]
    )
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "- atm" in text and "- model-merging" in text


def test_accuracy_helper_counts_hits():
    class Prediction:
        predictions = torch.tensor([[0.1, 0.9], [0.8, 0.2]]).numpy()
        label_ids = torch.tensor([1, 1]).numpy()

    assert accuracy(Prediction) == {"accuracy": 0.5}


def test_fractional_epochs_and_local_steps_set_the_length_of_segments(tmp_path):
    data = make_datasets({"colour": 40, "shape": 24, "size": 33})
    lengths = {}
    for name, changes in {
        "half": {"local_epochs": 0.5},
        "two": {"local_epochs": 2},
        "dropped": {"dataloader_drop_last": True},
        "steps": {"local_steps": 3},
    }.items():
        lengths[name] = make_trainer(tmp_path / name, train_dataset=data, **changes).atm.plan.lengths
    assert lengths == {"half": (3, 2, 3), "two": (10, 6, 9), "dropped": (5, 3, 4), "steps": (3, 3, 3)}


def test_a_model_from_model_init_is_fitted_out_too(tmp_path):
    from peft import LoraConfig

    trainer = ATMTrainer(
        args=make_config(tmp_path, num_rounds=1),
        model_init=TinyModel,
        train_dataset=small(),
        peft_config=LoraConfig(r=2, target_modules=["body.0"]),
    )
    trainer.train()
    assert trainer.report[0]["merged_norm"] > 0
    assert any("lora_A" in name for name in parameters_of(trainer.model))
