"""The way from models of different starts to a run: align, merge, repair, and tune on."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel

from hf_atm import MultiTaskModel
from hf_atm.alignment import Permutation, align_and_merge, spec_for
from hf_atm.cli.main import main
from hf_atm.merging import merge_checkpoints
from hf_atm.refine import refine, refine_arguments

from .test_realignment import texts
from .testing_utils import METRICS, TASKS, make_config, make_trainer


CONFIG = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
QUICK = {"starts": ["anchored"]}
IDS = torch.arange(20).reshape(4, 5)


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def reordered(model, seed, noise=0.0):
    moved = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    moved.load_state_dict(Permutation.random(spec_for(model), seed).apply(moved.state_dict()))
    return moved


def hidden(model):
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def test_bases_merge_into_one_that_a_run_starts_from(tmp_path):
    torch.manual_seed(0)
    base = shaken(BertModel(BertConfig(**CONFIG)))
    merged, aligned = align_and_merge(
        [reordered(base, seed) for seed in range(2)], [{"input_ids": IDS}], align_kwargs=QUICK
    )
    # Outputs come in the first model's order of units.
    order = Permutation.random(spec_for(base), 0).vectors["R"]
    torch.testing.assert_close(hidden(merged), hidden(base)[..., order], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden(aligned[1]), hidden(merged), rtol=0, atol=1e-5)
    tasks = {task: {"num_labels": labels} for task, labels in TASKS.items()}
    merged.save_pretrained(tmp_path / "base")
    model = MultiTaskModel.from_backbone(str(tmp_path / "base"), tasks=tasks, seed=0)
    trainer = make_trainer(tmp_path / "run", model, train_dataset=texts(), num_rounds=1)
    trainer.train()
    assert len(trainer.report) == 1


def test_experts_are_refined_with_their_own_heads(tmp_path):
    torch.manual_seed(0)
    body = shaken(BertModel(BertConfig(**CONFIG)))
    experts = []
    for seed, labels in enumerate(TASKS.values()):
        expert = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=labels)).eval()
        expert.bert.load_state_dict(body.state_dict())
        experts.append(reordered(expert, seed))
    data = [{"input_ids": IDS}]
    merged, aligned = align_and_merge(
        experts, data, exclude=["classifier.*"], repair_kwargs={"num_batches": 1}, align_kwargs=QUICK
    )
    tasks = {task: {"num_labels": labels} for task, labels in TASKS.items()}
    model = MultiTaskModel.from_backbone(merged, tasks=tasks, seed=0)
    for task, expert in zip(TASKS, aligned, strict=True):
        model.load_head(task, expert)
    for task, expert in zip(TASKS, experts, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=IDS, task=task).logits, expert(input_ids=IDS).logits, rtol=0, atol=1e-4
            )
    data = texts()
    args = refine_arguments(make_config(tmp_path, num_rounds=1), has_metrics=True)
    settings = {name: getattr(args, name) for name in ("eval_strategy", "save_strategy", "load_best_model_at_end")}
    trainer = make_trainer(
        tmp_path / "run",
        model,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=METRICS,
        num_rounds=1,
        metric_for_best_model=args.metric_for_best_model,
        greater_is_better=True,
        **settings,
    )
    result = refine(trainer)
    assert len(result.rounds) == 1 and result.best == max(result.start["eval_average"], *result.rounds)


def test_task_vectors_of_experts_begin_at_a_base_of_another_order():
    torch.manual_seed(0)
    base = shaken(BertModel(BertConfig(**CONFIG)))
    noisy = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    merged, aligned = align_and_merge(
        [reordered(noisy, 3)], base=base, method="task_arithmetic", scaling_coefficient=0.5, align_kwargs=QUICK
    )
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point():
            expected = (base.state_dict()[name] + noisy.state_dict()[name]) / 2
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert len(aligned) == 1


def test_inputs_stay_and_wrong_ones_are_refused():
    torch.manual_seed(0)
    base = shaken(BertModel(BertConfig(**CONFIG)))
    models = [reordered(base, seed, 0.05) for seed in range(2)]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    align_and_merge(models, iter([{"input_ids": IDS}] * 2), align_kwargs={"method": "activations", **QUICK})
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="needs at least two"):
        align_and_merge(models[:1])
    with pytest.raises(ValueError, match="needs a base model"):
        align_and_merge(models, method="ties", density=0.2)
    with pytest.raises(ValueError, match="data"):
        align_and_merge(models, align_kwargs={"method": "activations"})


def test_the_commands_of_the_guide(tmp_path):
    """`hf-atm align`, `hf-atm merge`, and heads from the aligned folders."""
    torch.manual_seed(0)
    body = shaken(BertModel(BertConfig(**CONFIG)))
    for seed, (task, labels) in enumerate(TASKS.items()):
        expert = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=labels)).eval()
        expert.bert.load_state_dict(body.state_dict())
        reordered(expert, seed).save_pretrained(tmp_path / task)
    folders = [str(tmp_path / task) for task in TASKS]
    assert main(["--quiet", "align", *folders, "--out", str(tmp_path / "aligned")]) == 0
    recipe = {"models": [str(tmp_path / "aligned" / task) for task in TASKS], "exclude": ["classifier.*"]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main(["--quiet", "merge", str(tmp_path / "recipe.json"), str(tmp_path / "merged")]) == 0
    tasks = {task: {"num_labels": labels} for task, labels in TASKS.items()}
    model = MultiTaskModel.from_backbone(AutoModel.from_pretrained(tmp_path / "merged"), tasks=tasks, seed=0)
    for task in TASKS:
        model.load_head(task, str(tmp_path / "aligned" / task))
        with torch.no_grad():
            expected = BertForSequenceClassification.from_pretrained(tmp_path / task).eval()(input_ids=IDS).logits
            torch.testing.assert_close(model.eval()(input_ids=IDS, task=task).logits, expected, rtol=0, atol=1e-5)


def test_the_flag_of_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    base = shaken(BertModel(BertConfig(**CONFIG)))
    for seed in range(2):
        reordered(base, seed).save_pretrained(tmp_path / f"m{seed}")
    (tmp_path / "recipe.json").write_text(json.dumps({"models": [str(tmp_path / f"m{seed}") for seed in range(2)]}))
    capsys.readouterr()
    arguments = ["merge", str(tmp_path / "recipe.json")]
    assert main([*arguments, str(tmp_path / "out"), "--align", "c2m3"]) == 0
    assert "aligned by c2m3: inner products of the weights" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "plain"), "--align", "c2m3", "--dry-run"]) == 0
    assert "aligned" not in capsys.readouterr().out
    found = merge_checkpoints(tmp_path / "recipe.json", tmp_path / "again", align="c2m3", progress=False)
    assert found.alignment["moved"]["m1"] > 0
    torch.testing.assert_close(
        hidden(AutoModel.from_pretrained(tmp_path / "out").eval()),
        hidden(AutoModel.from_pretrained(tmp_path / "m0").eval()),
        rtol=0,
        atol=1e-5,
    )
