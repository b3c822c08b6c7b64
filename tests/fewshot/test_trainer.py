"""Training and evaluation on episodes: learns, is honest about chance, goes on bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from hf_atm.fewshot import (
    FewShotConfig,
    FewShotModel,
    FewShotTrainer,
    accuracy_interval,
    evaluate_episodes,
)
from hf_atm.fewshot.evaluation import episode_scores

from . import reference
from .conftest import TinyEncoder, Vectors, collate


def trainer(settings, train=None, evaluation=None, dropout=0.0, dim=12, **kwargs):
    torch.manual_seed(0)
    return FewShotTrainer(
        TinyEncoder(dropout=dropout, dim=dim),
        settings,
        collate,
        train or Vectors(),
        evaluation,
        **kwargs,
    )


def test_separable_classes_are_learned_and_shuffled_labels_stay_at_chance(settings):
    run = trainer(settings(scale="auto"), train=Vectors(seed=1), evaluation=Vectors(seed=2))
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_accuracy"] > 0.99 and metrics["eval_macro_f1"] > 0.99
    assert metrics["eval_ci95"] < 0.01 and math.isfinite(metrics["eval_loss"])
    shuffled = evaluate_episodes(run.model, Vectors(seed=2, shuffled=True), 3, 2, 4, 2000, item_collator=collate)
    assert abs(shuffled["accuracy"] - 1 / 3) < 2.6 / 1.96 * shuffled["ci95"]


def test_the_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for chunk in np.split(generator.binomial(45, 0.8, size=(10000, 400)) / 45, 10000):
        mean, half = accuracy_interval(chunk[0])
        hits += abs(mean - 0.8) <= half
    assert 0.94 < hits / 10000 < 0.96
    assert math.isnan(accuracy_interval([0.5])[1])


def test_scores_equal_the_reference():
    generator = np.random.default_rng(0)
    predictions, labels = generator.integers(0, 4, (6, 12)), np.repeat(np.arange(4), 3)
    predictions[predictions == 3] = 0
    accuracy, f1 = episode_scores(torch.from_numpy(predictions), torch.from_numpy(labels), 4)
    assert np.allclose(accuracy, (predictions == labels).mean(1))
    assert np.allclose(f1, [reference.macro_f1(row, labels, 4) for row in predictions])


@pytest.mark.parametrize("conditioning", [False, True])
def test_evaluation_equals_the_forward_pass_whatever_the_batch_sizes(conditioning):
    torch.manual_seed(0)
    model = FewShotModel.from_encoder(
        TinyEncoder(dropout=0.5), conditioning=conditioning, gamma_init=0.5, scale=0.05
    ).train()
    data = Vectors(apart=1.0)
    first = evaluate_episodes(model, data, 3, 2, 4, 30, item_collator=collate)
    second = evaluate_episodes(
        model, data, 3, 2, 4, 30, item_collator=collate, episodes_per_batch=7, items_per_batch=11
    )
    assert model.training, "the mode is left as it was"
    assert first == pytest.approx(second, rel=1e-5)
    assert 0.3 < first["accuracy"] < 0.95
    model.encoder.per_episode = True  # takes the way of an encoder whose embeddings depend on the episode
    assert evaluate_episodes(model, data, 3, 2, 4, 30, item_collator=collate) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"conditioning": True, "mixup_weight": 0.5, "scale": "auto"}, {"head": "matching"}]
)
def test_resuming_in_the_middle_of_an_epoch_is_bit_exact(settings, tmp_path, changes):
    whole = trainer(settings(output_dir=str(tmp_path / "whole"), **changes), dropout=0.3)
    whole.train()
    config = settings(save_strategy="steps", save_steps=8, output_dir=str(tmp_path / "cut"), **changes)
    cut = trainer(config, dropout=0.3)
    cut.train()
    torch.manual_seed(99)
    resumed = trainer(config, dropout=0.3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert whole.state.global_step == resumed.state.global_step == 12
    for (name, first), second in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def test_every_epoch_draws_new_episodes(settings):
    run = trainer(settings(num_train_epochs=3, episodes_per_epoch=8))
    seen = []
    collator = run.data_collator
    run.data_collator = lambda episodes: seen.extend(episodes) or collator(episodes)
    run.train()
    assert len(seen) == 24
    assert len({tuple(np.concatenate([e.support, e.query], 1).ravel()) for e in seen}) == 24


def test_workers_change_nothing(settings):
    states = []
    for workers in (0, 2):
        run = trainer(settings(dataloader_num_workers=workers, mixup_weight=0.3), dropout=0.2)
        run.train()
        states.append(run.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluating_along_the_way_changes_nothing(settings):
    states = []
    for strategy in ("no", "steps"):
        config = settings(eval_strategy=strategy, eval_steps=3, mixup_weight=0.3)
        run = trainer(config, dropout=0.2, evaluation=Vectors(seed=3))
        run.train()
        states.append(run.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_loss_is_the_sum_of_its_parts(settings):
    def loss(**changes):
        run = trainer(settings(conditioning=True, gamma_init=0.5, **changes))
        batch = run.data_collator([run.train_dataset[i] for i in range(4)])
        return run.compute_loss(run.model, batch).item()

    plain = loss(film_weight=0.0)
    film = loss(film_weight=1.0) - plain
    assert film == pytest.approx(math.sqrt(2) * 0.5 + math.sqrt(2), rel=1e-4)
    one, two = (loss(film_weight=0.0, mixup_weight=weight) - plain for weight in (1.0, 2.0))
    assert one > 0 and two == pytest.approx(2 * one, rel=1e-3)


def test_a_step_is_the_mean_over_its_episodes_however_they_are_split(settings):
    run = trainer(settings(conditioning=True, gamma_init=0.5, mixup_weight=1.0, mixup_mask="blocks", scale=0.1))
    episodes = [run.train_dataset[i] for i in range(4)]

    def loss(part):
        return run.compute_loss(run.model, run.data_collator(part)).item()

    halves = (loss(episodes[:2]) + loss(episodes[2:])) / 2
    assert loss(episodes) == pytest.approx(halves, rel=1e-5)
    assert loss(episodes[::-1]) == pytest.approx(halves, rel=1e-5)


def test_only_the_named_classes_are_trained_on(settings):
    run = trainer(settings(), train_classes=[0, 2, 4], evaluation=Vectors(seed=3), eval_classes=[1, 3, 0])
    assert {label for i in range(24) for label in run.train_dataset[i].classes} == {0, 2, 4}
    assert math.isfinite(run.evaluate()["eval_accuracy"])
    several = run.evaluate({"a": Vectors(seed=3), "b": Vectors(seed=4)})
    assert {"eval_a_accuracy", "eval_b_accuracy"} <= set(several)


def test_patience_stops_and_keeps_the_best(settings):
    config = settings(
        num_train_epochs=20, patience=2, eval_strategy="epoch", save_strategy="epoch", learning_rate=0.5, scale=1.0
    )
    run = trainer(config, evaluation=Vectors(seed=3))
    run.train()
    assert run.state.epoch < 20
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_patience_with_several_sets_asks_for_one_of_them(settings):
    sets = {"a": Vectors(seed=3), "b": Vectors(seed=4)}
    wish = {"num_train_epochs": 1, "patience": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="metric_for_best_model is 'loss', but .* choose one, as 'a_loss'"):
        trainer(settings(**wish), evaluation=sets)
    run = trainer(settings(**wish, metric_for_best_model="b_loss"), evaluation=sets)
    run.train()
    assert run.state.best_metric == pytest.approx(run.evaluate()["eval_b_loss"], rel=1e-5)


def test_the_settings_parse_from_the_command_line(tmp_path):
    (parsed,) = HfArgumentParser(FewShotConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--n_way", "4", "--scale", "90", "--conditioning", "true", "--use_cpu", "true"]
    )
    assert (parsed.n_way, parsed.scale, parsed.conditioning) == (4, 90.0, True)
    assert parsed.per_device_train_batch_size == 32 and parsed.remove_unused_columns is False
    assert all(f.metadata.get("help") for f in FewShotConfig.__dataclass_fields__.values() if f.init)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_way": 1}, "n_way is 1"),
        ({"k_shot": 0}, "k_shot is 0"),
        ({"mixup_weight": -1.0}, "mixup_weight is -1"),
        ({"mixup_mask": "rows"}, "mixup_mask is 'rows'"),
        ({"scale": "big"}, "scale is 'big'"),
        ({"head": "matching", "mixup_weight": 0.1}, "latent MixUp needs prototypes"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "persistent_workers=True would repeat"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_way": 6}, "episodes of 6 classes need 6 of them, and there are 5"),
        ({"k_shot": 27}, "class 0 has 30 samples, and an episode takes 27 \\+ 4"),
    ],
)
def test_data_that_do_not_suffice_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(settings(**changes))
    enough = Vectors(classes=6, each=40)
    with pytest.raises(ValueError, match=message):
        trainer(settings(**changes), enough, Vectors())
    with pytest.raises(ValueError, match=message):
        trainer(settings(**changes), enough, {"a": enough, "b": Vectors()})


def test_narrow_embeddings_cannot_have_block_masks(settings):
    with pytest.raises(ValueError, match="the embeddings have 10; use mask='exact'"):
        trainer(settings(mixup_weight=0.1), dim=10)
    with pytest.raises(ValueError, match="pass an item_collator"):
        FewShotTrainer(TinyEncoder(), settings(), None, Vectors())
    with pytest.raises(ValueError, match="list has no labels"):
        FewShotTrainer(TinyEncoder(), settings(), collate, [{"x": torch.ones(6)}])
