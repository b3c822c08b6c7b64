"""Tasks with a prototypical head inside ATM: episodes, prototypes that follow the weights, what is refused."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_atm import ATMCallback, ATMTrainer, MultiTaskModel, PrototypicalTaskHead, refresh_prototypes
from hf_atm.baselines.joint import JointTrainer
from hf_atm.baselines.one_shot import OneShotMerges
from hf_atm.episodic import prototypical_head
from hf_atm.refine import refine, refine_arguments
from tests.reference import prototypical_loop
from tests.testing_utils import accuracy, largest_difference, make_config, make_data, parameters_of


EPISODES = {"head": "prototypical", "n_way": 2, "k_shot": 2, "n_query": 1}


class TwoTasks(nn.Module):
    """A linear encoder, one task with prototypes and one with a classifier."""

    def __init__(self, classes=3, scale=0.5, n_way=2, k_shot=2, n_query=1):
        super().__init__()
        self.body = nn.Linear(6, 4)
        few = PrototypicalTaskHead(4, classes, n_way, k_shot, n_query, scale)
        self.heads = nn.ModuleDict({"few": few, "many": nn.Linear(4, 2)})
        generator = torch.Generator().manual_seed(3)
        for parameter in (*self.body.parameters(), *self.heads["many"].parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, features, labels=None, episodes=None, task=None):
        hidden = self.body(features)
        if task == "few":
            result = self.heads[task](hidden, episodes)
        else:
            result = SequenceClassifierOutput(logits=self.heads[task](hidden))
        if labels is not None:
            result.loss = nn.functional.cross_entropy(result.logits, labels)
        return result


def few_data(size=5, classes=3, seed=0, spread=0.5):
    """`size` samples of each class, around centres of their own."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 6))
    labels = np.arange(classes).repeat(size)
    features = (centres[labels] + spread * rng.normal(size=(len(labels), 6))).astype(np.float32)
    columns = {"features": features.tolist(), "labels": labels.tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def data_of_two():
    return {"few": few_data(), "many": make_data("many", 16, labels=2)}


def trainer_of(output_dir, model=None, cls=ATMTrainer, data=None, evaluate=False, **changes):
    given = {name: changes.pop(name) for name in ("callbacks", "peft_config") if name in changes}
    values = {"per_device_train_batch_size": 4, "local_steps": 2, "num_rounds": 1, "dataloader_drop_last": False}
    if evaluate:
        given["eval_dataset"] = {"few": few_data(20, seed=1), "many": make_data("many", 16, labels=2)}
        given["compute_metrics"] = accuracy
    args = make_config(output_dir, **{**values, **changes})
    model = TwoTasks() if model is None else model
    return cls(model, args, train_dataset=data_of_two() if data is None else data, **given)


def class_means(model, data):
    features = model.body(data["features"][:]).detach().double()
    labels = data["labels"][:]
    return torch.stack([features[labels == label].mean(0) for label in labels.unique()])


def test_a_round_matches_a_plain_loop(tmp_path):
    model, data = TwoTasks(), data_of_two()
    trainer = trainer_of(tmp_path, copy.deepcopy(model), learning_rate=0.1, max_grad_norm=0)
    examples = [trainer.atm.round_dataset[index] for index in range(16)]
    drawn = [example.features.episode for example in examples if example.task == "few"]
    rows = [trainer.atm.round_dataset.locate(index)[2] for index in range(8, 16)]
    assert len(drawn) == 8 and examples[8].task == "many"
    steps = [[(e.support.tolist(), e.query.tolist()) for e in drawn[i : i + 4]] for i in (0, 4)]
    state = model.state_dict()
    expected = prototypical_loop.one_round(
        state["body.weight"],
        state["body.bias"],
        state["heads.few.log_scale"],
        (state["heads.many.weight"], state["heads.many.bias"]),
        (data["few"]["features"][:], steps),
        (data["many"]["features"][:], data["many"]["labels"][:], [rows[:4], rows[4:]]),
        rate=0.1,
    )
    trainer.train()
    found = {name: trainer.model.state_dict()[name] for name in expected}
    assert largest_difference(expected, found) <= 1e-6
    assert largest_difference({name: state[name] for name in expected}, found) > 1e-3
    prototypes = trainer.model.heads["few"].prototypes
    torch.testing.assert_close(prototypes.double(), class_means(trainer.model, data["few"]), atol=1e-6, rtol=0)


def test_episodes_are_new_in_every_epoch_and_round_and_the_same_in_every_run(tmp_path):
    first, second = (trainer_of(tmp_path, num_rounds=2, local_steps=8).atm.round_dataset for _ in range(2))

    def rows_of(dataset, round_index):
        dataset.set_epoch(round_index)
        found = [dataset[index].features.episode for index in range(32)]
        for episode in found:
            assert not set(episode.support.ravel()) & set(episode.query.ravel())
        return [np.concatenate([e.support, e.query], axis=1).ravel().tolist() for e in found]

    assert rows_of(first, 0) == rows_of(second, 0)
    assert rows_of(first, 1) == rows_of(second, 1)
    # 15 rows: an epoch is 15 episodes, and 32 are three epochs.
    epochs = [rows_of(first, 0)[:15], rows_of(first, 0)[15:30], rows_of(first, 1)[:15]]
    assert sorted(epochs[0]) != sorted(epochs[1]) and sorted(epochs[0]) != sorted(epochs[2])


def test_accumulation_changes_nothing(tmp_path):
    states = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path / str(batch), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        states.append(parameters_of(trainer.model))
    assert largest_difference(*states) <= 1e-6


@pytest.mark.parametrize("cls", [ATMTrainer, JointTrainer])
def test_scores_are_those_of_the_nearest_class_mean(tmp_path, cls):
    trainer = trainer_of(tmp_path, cls=cls, evaluate=True, num_rounds=3, local_steps=5, eval_strategy="epoch")
    trainer.train()
    held_out = few_data(20, seed=1)
    embedded = trainer.model.body(held_out["features"][:]).detach().double()
    nearest = torch.cdist(embedded, class_means(trainer.model, few_data())).argmin(1)
    expected = float((nearest == held_out["labels"][:]).double().mean())
    assert trainer.report[-1]["scores"]["few"] == pytest.approx(expected)
    assert expected > 0.6


class AtTaskEnd(ATMCallback):
    """Keeps prototypes as they are when a task's tuning has ended, and what they should be."""

    def on_task_end(self, args, state, control, *, task, model, **kwargs):
        if task == "few":
            self.found, self.expected = model.heads["few"].prototypes.clone(), class_means(model, few_data())


def test_experts_are_scored_with_prototypes_of_their_own(tmp_path):
    seen = AtTaskEnd()
    trainer = trainer_of(
        tmp_path, evaluate=True, eval_experts=True, eval_strategy="epoch", learning_rate=0.5, callbacks=[seen]
    )
    trainer.train()
    torch.testing.assert_close(seen.found.double(), seen.expected, atol=1e-6, rtol=0)
    assert (seen.found - trainer.model.heads["few"].prototypes).abs().max() > 1e-4


def test_the_scale_is_calibrated_on_the_training_data(tmp_path):
    model, data = TwoTasks(scale="auto"), few_data()
    trainer = trainer_of(tmp_path, model, head_learning_rate_ratio=1e-9)
    embedded = model.body(data["features"][:]).detach().double()
    mean = torch.cdist(embedded, class_means(model, data)).square().mean()
    trainer.train()
    assert float(trainer.model.heads["few"].log_scale.detach().exp()) == pytest.approx(10 / float(mean), rel=1e-4)


def test_head_steps_train_the_scale_alone(tmp_path):
    trainer = trainer_of(tmp_path, head_steps=2, local_steps=4, learning_rate=0.5)
    merge, merged = trainer.atm._merge, {}

    def remember(*args):
        report = merge(*args)
        merged.update(parameters_of(trainer.model))
        return report

    trainer.atm._merge = remember
    trainer.train()
    final = parameters_of(trainer.model)
    assert torch.equal(final["body.weight"], merged["body.weight"])
    assert not torch.equal(final["heads.few.log_scale"], merged["heads.few.log_scale"])


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_run_goes_on_bit_by_bit(tmp_path, step):
    settings = {"num_rounds": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    whole = trainer_of(tmp_path / "whole", TwoTasks(scale="auto"), **settings)
    whole.train()
    resumed = trainer_of(tmp_path / "other", TwoTasks(scale="auto"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert largest_difference(parameters_of(whole.model), parameters_of(resumed.model)) == 0


def test_a_resumed_run_must_have_the_same_episodes(tmp_path):
    trainer_of(tmp_path / "a", save_strategy="steps", save_steps=1).train()
    other = trainer_of(tmp_path / "b", TwoTasks(k_shot=3), save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="episodes"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_one_shot_merges_score_with_prototypes_of_each_merge(tmp_path):
    trainer = trainer_of(tmp_path, evaluate=True, keep_task_vectors=True, local_steps=5)
    merges = OneShotMerges(trainer, ["mean", "task_arithmetic"])
    trainer.add_callback(merges)
    trainer.train()
    assert set(merges.rows["mean untuned"]["validation"]) == {"few", "many"}
    assert merges.rows["mean untuned"]["validation"]["few"] > 0.5


# ---- In a MultiTaskModel ----


def bert_of(tasks=None, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    tasks = {"few": {"num_labels": 3, **EPISODES}, "many": {"num_labels": 2}} if tasks is None else tasks
    return MultiTaskModel.from_backbone(BertModel(config), tasks=tasks, seed=1, **options)


def tokens_of(classes, size, seed=0, length=6):
    rng = np.random.default_rng(seed)
    labels = np.arange(classes).repeat(size)
    ids = np.where(
        rng.random((len(labels), length)) < 0.5, labels[:, None] + 5, rng.integers(10, 40, (len(labels), length))
    )
    columns = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist(), "labels": labels.tolist()}
    return datasets.Dataset.from_dict(columns)


def bert_data():
    return {"few": tokens_of(3, 5), "many": tokens_of(2, 8)}


def test_the_model_classifies_all_classes_and_survives_saving(tmp_path):
    trainer = trainer_of(tmp_path, bert_of(), data=bert_data(), learning_rate=0.01, num_rounds=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = trainer.model.eval()
    loaded = MultiTaskModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.tasks == model.config.tasks
    ids = torch.tensor(tokens_of(3, 4, seed=2)["input_ids"])
    logits = model(input_ids=ids, task="few").logits
    assert logits.shape == (12, 3)
    assert torch.equal(logits, loaded(input_ids=ids, task="few").logits)
    hidden = model.backbone(input_ids=torch.tensor(bert_data()["few"]["input_ids"])).last_hidden_state.mean(1)
    expected = hidden.detach().view(3, 5, -1).mean(1)
    torch.testing.assert_close(loaded.heads["few"].prototypes, expected, atol=1e-5, rtol=0)


def test_after_another_change_of_weights_prototypes_are_refreshed_by_hand(tmp_path):
    trainer = trainer_of(tmp_path, bert_of(), data=bert_data())
    trainer.train()
    model = trainer.model
    before = model.heads["few"].prototypes.clone()
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight.add_(torch.randn(40, 16))
    few = bert_data()["few"].with_format("torch")
    refresh_prototypes(model, "few", few, torch.utils.data.default_collate, batch_size=4)
    assert (model.heads["few"].prototypes - before).abs().max() > 0.01
    whole = model.heads["few"].prototypes.clone()
    refresh_prototypes(model, "few", few, torch.utils.data.default_collate, batch_size=100)
    torch.testing.assert_close(model.heads["few"].prototypes, whole, atol=1e-6, rtol=0)


def test_private_modules_are_those_of_the_task(tmp_path):
    trainer = trainer_of(
        tmp_path, bert_of(), data=bert_data(), learning_rate=0.05, task_specific_modules=["LayerNorm"], local_steps=4
    )
    trainer.train()
    model = trainer.model.eval()
    model.activate_task("few")
    hidden = model.backbone(input_ids=torch.tensor(bert_data()["few"]["input_ids"])).last_hidden_state.mean(1)
    expected = hidden.detach().view(3, 5, -1).mean(1)
    torch.testing.assert_close(model.heads["few"].prototypes, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["delta", "adapter"])
def test_beside_an_adapter(tmp_path, mode):
    trainer = trainer_of(
        tmp_path / "run", bert_of(), data=bert_data(), peft_config=LoraConfig(r=2, target_modules=["query", "value"]),
        lora_merge_mode=mode, learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.tensor(tokens_of(3, 4, seed=2)["input_ids"])
    logits = trainer.model.eval()(input_ids=ids, task="few").logits
    assert logits.shape == (12, 3) and logits.std() > 0
    if mode == "delta":
        loaded = MultiTaskModel.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(loaded(input_ids=ids, task="few").logits, logits)


@pytest.mark.parametrize("mode", ["delta", "svd"])
def test_adapters_of_experts_have_prototypes_of_their_own(tmp_path, mode):
    data = bert_data()
    trainer = trainer_of(
        tmp_path / "run", bert_of(), data=data, peft_config=LoraConfig(r=2, target_modules=["query", "value"]),
        lora_merge_mode=mode, learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    merged = bert_of() if mode == "svd" else MultiTaskModel.from_pretrained(tmp_path / "saved")
    of_merged = prototypical_head(trainer.model, "few").prototypes.clone()
    expert = PeftModel.from_pretrained(merged, tmp_path / "saved" / "adapters" / "few").eval()
    backbone = expert.get_base_model().backbone
    hidden = backbone(input_ids=torch.tensor(data["few"]["input_ids"])).last_hidden_state.mean(1)
    expected = hidden.detach().view(3, 5, -1).mean(1)
    torch.testing.assert_close(prototypical_head(expert, "few").prototypes, expected, atol=1e-5, rtol=0)
    assert (expected - of_merged).abs().max() > 1e-3
    # Saving has left the merged model as it was.
    assert torch.equal(prototypical_head(trainer.model, "few").prototypes, of_merged)
    trainer.save_model(str(tmp_path / "again"))
    assert torch.equal(prototypical_head(trainer.model, "few").prototypes, of_merged)


def test_a_head_without_prototypes_says_so():
    model = bert_of()
    with pytest.raises(ValueError, match="no prototypes yet"):
        model(input_ids=torch.tensor([[5, 6]]), task="few")
    with pytest.raises(ValueError, match="classifier"):
        model(input_ids=torch.tensor([[5, 6]]), episodes=torch.zeros(1, 2, 2).long(), task="many")
    with pytest.raises(ValueError, match="no stock class"):
        model.to_task_model("few")
    with pytest.raises(ValueError, match="'many' has no prototypical head"):
        refresh_prototypes(model, "many", bert_data()["many"], lambda rows: rows)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_labels": 3, "n_way": 4}, "n_way is 4, but there are 3 classes"),
        ({"num_labels": 3, "k_shot": None}, "needs k_shot, a whole number from 1, not None"),
        ({"num_labels": 3, "n_query": 0}, "needs n_query, a whole number from 1, not 0"),
        ({"num_labels": 1}, "the task is a regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "is a multi_label_classification"),
        ({"num_labels": 3, "scale": -1}, "scale is -1"),
        ({"num_labels": 3, "distance": "manhattan"}, "distance is 'manhattan'"),
        ({"num_labels": 3, "pooling": "max"}, "unknown pooling 'max'"),
        ({"num_labels": 3, "head": "nearest"}, "unknown head 'nearest'"),
        ({"num_labels": 3, "head": None}, "n_way belongs to episodes"),
    ],
)
def test_entries_that_cannot_be(entry, message):
    with pytest.raises(ValueError, match=message) as error:
        bert_of({"few": {**EPISODES, **entry}})
    assert "'few'" in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (few_data(2), "class 0 has 2 samples, and an episode takes 2 \\+ 1"),
        (few_data(5, classes=2), "class 2 has no samples"),
        (few_data().remove_columns("labels"), "has no labels"),
    ],
)
def test_data_that_do_not_suffice(tmp_path, data, message):
    with pytest.raises(ValueError, match=f"Task 'few' has a prototypical head: .*{message}"):
        trainer_of(tmp_path, data={**data_of_two(), "few": data})


def test_refining_with_fewer_samples_takes_the_model_as_it_came(tmp_path):
    model = TwoTasks()
    first = trainer_of(tmp_path / "first", model, data={**data_of_two(), "few": few_data(40)}, evaluate=True)
    first.train()
    first.save_model(str(tmp_path / "first"))
    given = model.heads["few"].prototypes.clone()
    args = refine_arguments(make_config(tmp_path / "refined", local_steps=2, learning_rate=1e30), has_metrics=True)
    evaluation = {"few": few_data(20, seed=1), "many": make_data("many", 16, labels=2)}
    trainer = ATMTrainer(model, args, train_dataset=data_of_two(), eval_dataset=evaluation, compute_metrics=accuracy)
    before = first.evaluate()["eval_few_accuracy"]
    result = refine(trainer)
    assert result.start["eval_few_accuracy"] == before
    trainer.save_model(str(tmp_path / "kept"))
    assert result.best_round == 0 and torch.equal(model.heads["few"].prototypes, given)
    assert trainer.evaluate()[result.metric] == pytest.approx(result.best)


def test_labels_beyond_the_head_are_named(tmp_path):
    data = few_data(classes=4)
    with pytest.raises(ValueError, match="task 'few' has a sample of class 3, and its head has 3 classes"):
        refresh_prototypes(
            TwoTasks(), "few", data, lambda rows: {"features": torch.stack([r["features"] for r in rows])}
        )
