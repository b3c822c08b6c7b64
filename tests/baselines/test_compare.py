"""A comparison end to end on the tiny model: equal steps, cells kept, figures that can be computed again."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
import torch
from transformers import TrainerCallback

from hf_atm import ATMCallback
from hf_atm.baselines import BASELINES, OneShotMerges, Suite, compare, parse_members
from hf_atm.baselines.cells import run_cell
from hf_atm.baselines.members import check_budgets
from hf_atm.baselines.summary import normalized, summarize
from hf_atm.merging import merge_task_vectors
from tests.testing_utils import METRICS, TASKS, TinyModel, make_config, make_data, make_datasets, make_trainer


def suite(tmp_path, built=None, test=True):
    def build(seed):
        if built is not None:
            built.append(seed)
        torch.manual_seed(seed)
        model = TinyModel()
        with torch.no_grad():
            for head in model.heads.values():
                head.weight.normal_(std=0.3)
        return model

    return Suite(
        build_model=build,
        train=make_datasets(),
        validation={task: make_data(task, 24) for task in TASKS},
        test={task: make_data(task, 30) for task in TASKS} if test else {},
        args=make_config(tmp_path / "out", num_rounds=2, eval_strategy="epoch", lr_scheduler_type="linear"),
        trainer_kwargs={"compute_metrics": METRICS},
    )


class Steps(TrainerCallback):
    """Notes every step, and interrupts the run after one of them."""

    def __init__(self, stop_after=None):
        self.steps, self.stop_after = [], stop_after

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


MEMBERS = {
    "one_shot": {"merges": ["mean", "ties"]},
    "joint": {},
    "joint_proportional": {},
    "atm": {},
    "search": {"baseline": "atm", "outer_learning_rate": "search"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    lines: list[str] = []
    result = compare(suite(folder), parse_members(MEMBERS), [0, 1], 4, folder / "out", report=lines.append)
    return folder, result, lines


def test_files_hold_what_was_measured(finished):
    folder, result, lines = finished
    output = folder / "out"
    assert json.loads((output / "comparison.json").read_text())["rows"].keys() == result["rows"].keys()
    assert (output / "comparison.png").stat().st_size > 10_000
    table = (output / "comparison.md").read_text()
    assert all(f"| {name} |" in table for name in result["rows"])
    assert len(lines) == 10 and "joint, seed 1:" in "".join(lines)
    assert not list(output.rglob("checkpoint-*"))


def test_one_shot_rows_pool_running_statistics_as_the_loop_does(tmp_path):
    trainer = make_trainer(
        tmp_path,
        TinyModel(batch_norm=True),
        eval_dataset={task: make_data(task, 24) for task in TASKS},
        compute_metrics=METRICS,
        num_rounds=1,
        keep_task_vectors=True,
    )
    merges = OneShotMerges(trainer, ["mean"])
    trainer.add_callback(merges)
    trainer.train()
    assert merges.rows["mean untuned"]["validation"] == pytest.approx(trainer.quiet_scores(trainer.eval_dataset))


def test_rows_are_means_over_seeds_of_the_cells(finished):
    folder, result, _ = finished
    for name in ("joint", "atm", "search"):
        cells = [
            json.loads((folder / "out" / "cells" / name / f"seed-{seed}" / "cell.json").read_text()) for seed in (0, 1)
        ]
        averages = [statistics.fmean(cell["rows"][name]["test"].values()) for cell in cells]
        figures = result["rows"][name]["test"]["average"]
        assert figures["mean"] == pytest.approx(statistics.fmean(averages))
        assert figures["std"] == pytest.approx(statistics.stdev(averages))
        worst = [min(cell["rows"][name]["test"].values()) for cell in cells]
        assert result["rows"][name]["test"]["worst"]["mean"] == pytest.approx(statistics.fmean(worst))


def test_all_members_take_the_same_number_of_steps(finished):
    _, result, _ = finished
    assert {row["cost"]["optimizer_steps"] for row in result["rows"].values()} == {12}
    assert {row["cost"]["examples"] for row in result["rows"].values()} == {12 * 8}


def test_the_ledger_counts_messages_and_searches(finished):
    _, result, _ = finished
    cost = {name: row["cost"] for name, row in result["rows"].items()}
    shared = 4 * (6 * 12 + 12 + 12 * 8 + 8)
    assert cost["atm"]["communicated_bytes"] == 2 * 3 * 2 * shared
    assert cost["joint"]["communicated_bytes"] == 2 * 12 * shared
    assert cost["experts"]["communicated_bytes"] == 0
    assert cost["one-shot mean tuned"]["communicated_bytes"] == 2 * 3 * shared
    candidates = cost["search"]["searched_examples"] / 72
    assert cost["search"]["communicated_bytes"] == cost["atm"]["communicated_bytes"] + 3 * shared * candidates
    assert cost["one-shot mean tuned"]["seconds"] > cost["one-shot mean untuned"]["seconds"] > 0
    assert cost["one-shot mean tuned"]["searched_examples"] == 8 * 72
    assert cost["one-shot mean untuned"]["searched_examples"] == cost["atm"]["searched_examples"] == 0
    assert cost["search"]["searched_examples"] >= 2 * 3 * 72


def test_a_second_run_repeats_nothing(finished, tmp_path):
    folder, result, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    built: list[int] = []
    again = compare(suite(tmp_path, built), parse_members(MEMBERS), [0, 1], 4, tmp_path / "out")
    assert built == [] and again["rows"].keys() == result["rows"].keys()
    assert again["rows"]["joint"]["test"] == result["rows"]["joint"]["test"]
    # One cell is lost: it alone runs, and gives what it gave.
    shutil.rmtree(tmp_path / "out" / "cells" / "joint" / "seed-1")
    again = compare(suite(tmp_path, built), parse_members(MEMBERS), [0, 1], 4, tmp_path / "out")
    # Once to see that it can be built, once to run.
    assert built == [1, 1]
    assert again["rows"]["joint"]["test"] == result["rows"]["joint"]["test"]


def test_cells_of_other_settings_are_not_taken_for_these(finished, tmp_path):
    folder, _, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    members = parse_members({**MEMBERS, "atm": {"learning_rate": 0.1}})
    with pytest.raises(ValueError, match=r"made with other settings \(settings.learning_rate: 0.05 -> 0.1\)"):
        compare(suite(tmp_path), members, [0, 1], 4, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda suite: setattr(suite.args, "learning_rate", 0.2), "learning_rate"),
        (lambda suite: setattr(suite, "identity", {"model": "another"}), "suite.model"),
        (
            lambda suite: setattr(suite, "train", make_datasets({"colour": 8, "shape": 24, "size": 32})),
            "examples.train",
        ),
    ],
)
def test_common_settings_model_and_data_belong_to_a_cell(finished, tmp_path, change, message):
    folder, _, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    changed = suite(tmp_path)
    change(changed)
    with pytest.raises(ValueError, match=message):
        compare(changed, parse_members(MEMBERS), [0, 1], 4, tmp_path / "out")


def test_where_and_how_often_it_reports_does_not(finished, tmp_path):
    folder, result, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    changed = suite(tmp_path)
    changed.args.logging_steps, changed.args.save_strategy = 3, "steps"
    again = compare(changed, parse_members(MEMBERS), [0, 1], 4, tmp_path / "out")
    assert again["rows"]["atm"]["test"] == result["rows"]["atm"]["test"]


def test_more_steps_with_the_same_segments_are_another_cell(tmp_path):
    members = parse_members({"atm": {}})
    compare(suite(tmp_path), members, [0], 4, tmp_path / "out")
    longer = suite(tmp_path)
    longer.args.num_rounds = 4
    with pytest.raises(ValueError, match="num_rounds: 2 -> 4"):
        compare(longer, members, [0], 8, tmp_path / "out")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"atm": {"merge_method": "average"}}, "compare.members.atm: .*average"),
        ({"atm": {"task_weights": {"colour": 1.0, "smell": 1.0}}}, "compare.members.atm: .*unknown.*smell"),
        ({"atm": {"task_weights": {"colour": -1.0}}}, r"compare.members.atm: task_weights\['colour'\] is -1.0"),
        ({"atm": {"task_weights": dict.fromkeys(TASKS, 0)}}, "compare.members.atm: All task_weights are zero"),
        (
            {"recommended": {"num_rounds": 4, "optim": "adamw_torch"}},
            "compare.members.recommended: head_steps=0.2 leaves",
        ),
        ({"joint": {"task_specific_modules": ["body.0"]}}, "compare.members.joint: .*task_specific_modules"),
        ({"pretrained": {}}, "compare.members.pretrained: .*has none"),
        ({"cold_fusion": {}}, "compare.members.cold_fusion: .*MultiTaskModel"),
    ],
)
def test_members_that_cannot_run_are_refused_before_any_does(tmp_path, members, message):
    with pytest.raises((ValueError, KeyError), match=message):
        compare(suite(tmp_path), parse_members({"fedavg": {}, **members}), [0], 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_that_diverges_is_a_failed_row(tmp_path):
    members = parse_members({"wild": {"baseline": "atm", "learning_rate": 1e30}, "atm": {}})
    for _ in range(2):
        result = compare(suite(tmp_path), members, [0], 4, tmp_path / "out")
        assert "validation" not in result["rows"]["wild"] and "NaN" in result["rows"]["wild"]["failed"][0]
        assert set(result["rows"]["atm"]["validation"]["tasks"]) == set(TASKS)
    assert "Failed: wild, seed 0" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_named_method_does_not_inherit_settings_of_atm(tmp_path):
    changed = suite(tmp_path)
    changed.args.head_steps, changed.args.outer_momentum, changed.args.max_task_vector_norm = 0.5, 0.8, 0.01
    changed.args.merge_method, changed.args.merge_kwargs = "ties", {"density": 0.2}
    members = parse_members({"fedavg": {}})
    rows = compare(changed, members, [0], 4, tmp_path / "changed")["rows"]
    plain = compare(suite(tmp_path), members, [0], 4, tmp_path / "plain")["rows"]
    assert rows["fedavg"]["test"] == plain["fedavg"]["test"]


def test_several_one_shot_members_keep_their_rows(tmp_path):
    members = parse_members({"one_shot": {"merges": "mean"}, "slow": {"baseline": "one_shot", "learning_rate": 1e-9}})
    rows = compare(suite(tmp_path), members, [0], 4, tmp_path / "out")["rows"]
    assert {"experts", "one-shot mean tuned", "slow, experts", "slow, one-shot ties untuned"} <= set(rows)
    assert rows["experts"]["test"]["normalized"]["mean"] == pytest.approx(1.0)
    assert rows["experts"]["test"]["average"] != rows["slow, experts"]["test"]["average"]


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tmp_path):
    (member,) = parse_members({"atm": {"save_strategy": "epoch", "optim": "adamw_torch"}})
    settings = check_budgets([member], list(TASKS), vars(make_config(tmp_path, num_rounds=2)), 6)["atm"]
    whole = run_cell(suite(tmp_path), member, settings, 0, tmp_path / "whole")

    broken = suite(tmp_path)
    broken.prepare = lambda trainer: trainer.add_callback(Steps(stop_after=10))
    with pytest.raises(KeyboardInterrupt):
        run_cell(broken, member, settings, 0, tmp_path / "cell")
    assert list((tmp_path / "cell" / "run").glob("checkpoint-9")) and not (tmp_path / "cell" / "cell.json").exists()
    counter, resumed = Steps(), suite(tmp_path)
    resumed.prepare = lambda trainer: trainer.add_callback(counter)
    again = run_cell(resumed, member, settings, 0, tmp_path / "cell")
    assert again["rows"]["atm"]["test"] == whole["rows"]["atm"]["test"]
    assert counter.steps == list(range(10, 19))


def test_one_shot_rows_equal_merges_made_by_hand(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset={task: make_data(task, 24) for task in TASKS},
        compute_metrics=METRICS,
        num_rounds=1,
        keep_task_vectors=True,
        eval_experts=True,
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "heads" not in name}
    merges = OneShotMerges(trainer, ["ties", "tsv_m"])
    held: dict[str, dict[str, torch.Tensor]] = {}

    class Keep(ATMCallback):
        def on_task_end(self, args, state, control, *, round, task, model, **kwargs):
            held[task] = {n: p.detach() - start[n] for n, p in model.named_parameters() if "heads" not in n}

    trainer.add_callback(Keep())
    trainer.add_callback(merges)
    trainer.train()
    assert merges.rows["experts"]["validation"] == pytest.approx(trainer.report[0]["expert_scores"])
    for method, kwargs in (("ties", {"density": 0.2}), ("tsv_m", {})):
        tasks = sorted(TASKS)
        move = merge_task_vectors([held[task] for task in tasks], method, names=tasks, **kwargs)
        rows = {label: merges.rows[f"{method} {label}"] for label in ("tuned", "untuned")}
        for row in rows.values():
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "heads" not in name:
                        parameter.copy_(start[name] + row["scale"] * move[name])
            assert trainer.quiet_scores(trainer.eval_dataset) == pytest.approx(row["validation"])
        average = {label: statistics.fmean(row["validation"].values()) for label, row in rows.items()}
        assert average["tuned"] >= average["untuned"] and rows["untuned"]["scale"] == 1.0


# The others need a MultiTaskModel; see tests/cli/test_compare.py.
@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"pretrained", "cold_fusion"}))
def test_every_baseline_runs(tmp_path, name):
    settings = {"optim": "adamw_torch"} if name == "recommended" else {}
    merges = {"merges": ["mean", "task_arithmetic", "consensus", "breadcrumbs", "dare", "iso_c"]}
    members = parse_members({name: merges if name == "one_shot" else settings})
    result = compare(suite(tmp_path, test=False), members, [3], 4, tmp_path / "out")
    rows = result["rows"]
    assert len(rows) == (13 if name == "one_shot" else 1)
    assert all(set(row["validation"]["tasks"]) == set(TASKS) for row in rows.values())


def test_fedavg_is_atm_with_weights_by_size(tmp_path):
    members = parse_members({"fedavg": {}, "same": {"baseline": "atm", "task_weights": "num_examples"}})
    rows = compare(suite(tmp_path), members, [0], 4, tmp_path / "out")["rows"]
    assert rows["fedavg"]["test"] == rows["same"]["test"]


def test_normalised_scores_leave_out_experts_at_chance():
    assert normalized({"a": 0.5, "b": 0.3}, {"a": 0.8, "b": 0.4}) == pytest.approx((0.625 + 0.75) / 2)
    assert normalized({"a": 0.5, "b": 0.3}, {"a": 0.8, "b": 0.01}) == pytest.approx(0.625)
    assert normalized({"a": 0.5}, {}) is None


def test_summary_of_one_seed_has_no_spread():
    row = {"validation": {"a": 0.5, "b": 0.7}, "test": {}, "cost": dict.fromkeys(_COSTS, 1)}
    rows = summarize({0: {"x": {"rows": {"x": row}}}})
    assert rows["x"]["validation"]["average"] == {"mean": pytest.approx(0.6), "std": 0.0}
    assert "test" not in rows["x"] and "normalized" not in rows["x"]["validation"]


_COSTS = ("optimizer_steps", "examples", "seconds", "communicated_bytes", "searched_examples")


@pytest.mark.parametrize(
    ("seeds", "members", "message"),
    [
        ([], {"atm": {}}, "seeds must be different"),
        ([1, 1], {"atm": {}}, "seeds must be different"),
        ([1], {"a b": {"baseline": "atm"}, "a-b": {"baseline": "atm"}}, "names must differ"),
    ],
)
def test_bad_comparisons(tmp_path, seeds, members, message):
    built: list[int] = []
    with pytest.raises(ValueError, match=message):
        compare(suite(tmp_path, built), parse_members(members), seeds, 4, tmp_path / "out")
    blind = suite(tmp_path, built)
    del blind.validation["shape"]
    with pytest.raises(ValueError, match="Task 'shape' has no validation data, by which methods are compared"):
        compare(blind, parse_members({"atm": {}}), [1], 4, tmp_path / "out")
    assert built == [] and not (tmp_path / "out").exists()
