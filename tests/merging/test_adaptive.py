from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_atm import MultiTaskConfig, MultiTaskModel
from hf_atm.merging import get_merge_method, learn_coefficients, merge_state_dicts, merge_task_vectors

from .testing_utils import assert_same, random_vectors


TASKS = ("left", "right", "both")


class Net(nn.Module):
    """A shared body and one private head, which stays as it was drawn."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 12), nn.Tanh())
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        return self.head(self.body(x))


def make_task(index, size=400):
    """Each task looks at three inputs of its own, so that what tasks learn can be added up."""
    x = torch.randn(size, 9, generator=torch.Generator().manual_seed(10 + index))
    own = slice(3 * index, 3 * index + 3)
    masked = torch.zeros_like(x)
    masked[:, own] = x[:, own]
    return masked, x[:, own].argmax(dim=1)


@pytest.fixture(scope="module")
def experts():
    """A common start and three models fine-tuned from it, with test data."""
    torch.manual_seed(1)
    base = Net()
    models, tests = [], []
    for index in range(3):
        x, y = make_task(index)
        model = Net()
        model.body.load_state_dict(base.body.state_dict())
        optimizer = torch.optim.Adam(model.body.parameters(), lr=0.005)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
            optimizer.step()
        models.append(model)
        tests.append((x[200:], y[200:]))
    return base, models, tests


def learn(experts, **options):
    base, models, tests = experts
    loaders = {task: [x for x in data[0].split(100)] for task, data in zip(TASKS, tests, strict=True)}
    options = {"num_steps": 40, "learning_rate": 0.01, "exclude": ["head.*"], "disable_tqdm": True, **options}
    return learn_coefficients(models, base, models, loaders, **options)


def merged_body(experts, coefficients):
    base, models, _ = experts
    names, body = list(TASKS), [key for key in base.state_dict() if key.startswith("body")]
    states = [{key: model.state_dict()[key] for key in body} for model in models]
    origin = {key: base.state_dict()[key] for key in body}
    return merge_state_dicts(states, origin, "adamerging", names=names, coefficients=coefficients)


def scores(experts, coefficients):
    """Mean accuracy and entropy of the merged body under each task's own head."""
    _, models, tests = experts
    state = merged_body(experts, coefficients)
    accuracy = entropy = 0.0
    for model, (x, y) in zip(models, tests, strict=True):
        with torch.no_grad():
            probabilities = torch.func.functional_call(model, state, (x,)).softmax(dim=-1)
        accuracy += float((probabilities.argmax(dim=-1) == y).double().mean()) / 3
        entropy += float(-(probabilities * probabilities.log()).sum(dim=-1).mean()) / 3
    return accuracy, entropy


@pytest.mark.parametrize("layerwise", [True, False])
def test_entropy_falls_and_accuracy_rises(experts, layerwise):
    found = learn(experts, layerwise=layerwise)
    uniform = {key: [0.3] * 3 for key in found.coefficients}
    accuracy, entropy = scores(experts, found.coefficients)
    uniform_accuracy, uniform_entropy = scores(experts, uniform)
    assert entropy < uniform_entropy - 0.05
    assert accuracy > uniform_accuracy + 0.02
    # The history begins with the uniform coefficients, on the first batches.
    assert len(found.history) == 40 and found.history[0] == pytest.approx(uniform_entropy, abs=0.05)
    assert found.history[-1] < found.history[0]
    rows = list(found.coefficients.values())
    assert len(rows) == 4 and all(len(row) == 3 for row in rows)
    assert (rows.count(rows[0]) == 4) is not layerwise


def test_the_first_step_follows_the_gradient_of_the_entropy(experts):
    """Adam's first step is the learning rate against the sign of the gradient, here taken by autograd."""
    base, models, tests = experts
    found = learn(experts, num_steps=1, learning_rate=1e-3)
    keys = sorted(found.coefficients)
    coefficients = torch.full((len(keys), 3), 0.3, requires_grad=True)
    start, states = base.state_dict(), [model.state_dict() for model in models]
    body = {
        key: start[key] + sum(coefficients[i, t] * (states[t][key] - start[key]) for t in range(3))
        for i, key in enumerate(keys)
    }
    total = 0
    for model, (x, _) in zip(models, tests, strict=True):
        log_probabilities = torch.func.functional_call(model, body, (x[:100],)).log_softmax(dim=-1)
        total = total - (log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
    total.backward()
    expected = 0.3 - 1e-3 * coefficients.grad.sign()
    torch.testing.assert_close(torch.tensor([found.coefficients[key] for key in keys]), expected, atol=1e-6, rtol=0)


def test_coefficients_are_reproducible_and_independent_of_the_order(experts):
    base, models, tests = experts
    first, again = learn(experts, num_steps=5), learn(experts, num_steps=5)
    assert first == again and json.loads(json.dumps(first.coefficients)) == first.coefficients
    loaders = {task: data[0].split(100) for task, data in zip(TASKS, tests, strict=True)}
    turned = learn_coefficients(
        models[::-1],
        base.state_dict(),
        [model.state_dict() for model in models[::-1]],
        dict(reversed(loaders.items())),
        num_steps=5,
        learning_rate=0.01,
        exclude=["head.*"],
        disable_tqdm=True,
    )
    assert {key: row[::-1] for key, row in turned.coefficients.items()} == first.coefficients


def test_modules_are_left_as_they_were(experts):
    base, models, _ = experts
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in models]
    models[0].train(), models[1].eval()
    learn(experts, num_steps=2)
    assert models[0].training and not models[1].training
    for model, state in zip(models, before, strict=True):
        assert_same(dict(model.state_dict()), state)
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in base.parameters())


def test_stock_classifiers_with_private_heads_of_equal_shape():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=2, **sizes)
    base, *models = (BertForSequenceClassification(config) for _ in range(3))
    batch = {"input_ids": torch.tensor([[3, 5, 7], [2, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    found = learn_coefficients(
        models, base, models, [[batch]] * 2, num_steps=2, exclude=["classifier.*"], disable_tqdm=True
    )
    parameters = {name for name, _ in base.named_parameters() if not name.startswith("classifier")}
    assert set(found.coefficients) == parameters
    merged = merge_state_dicts(
        models, base, "adamerging", coefficients=found.coefficients, exclude=["classifier.*"], names=["a", "b"]
    )
    base.load_state_dict(merged)


def test_one_multi_task_model_is_told_the_task():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    tasks = {"a": {"num_labels": 2}, "b": {"num_labels": 3}, "number": {"num_labels": 1}}
    model = MultiTaskModel(
        MultiTaskConfig(backbone_config=BertConfig(vocab_size=20, max_position_embeddings=16, **sizes), tasks=tasks)
    )
    base = model.state_dict()
    states = [{key: value + 0.05 * torch.randn_like(value) for key, value in base.items()} for _ in tasks]
    loaders = {"a": [{"input_ids": torch.tensor([[3, 5, 7]])}], "b": [{"input_ids": torch.tensor([[2, 4]])}]}
    options = {"names": list(tasks), "num_steps": 2, "exclude": ["heads.*"], "disable_tqdm": True}
    # A regression has no entropy; its task vector still gets a coefficient.
    found = learn_coefficients(model, base, states, loaders, **options)
    assert all(key.startswith("backbone.") and len(row) == 3 for key, row in found.coefficients.items())
    assert any(row[2] != 0.3 for row in found.coefficients.values())
    with pytest.raises(ValueError, match="'number' predicts numbers"):
        learn_coefficients(model, base, states, {**loaders, "number": loaders["a"]}, **options)


def test_tied_parameters_have_coefficients_under_every_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    states = [{key: torch.randn(4, 4) if key.endswith("weight") else torch.randn(4) for key in model.state_dict()}]
    states[0]["1.weight"] = states[0]["0.weight"]
    found = learn_coefficients(model, model, states, [[torch.ones(2, 4)]], num_steps=1, disable_tqdm=True)
    assert sorted(found.coefficients) == sorted(model.state_dict())
    assert found.coefficients["0.weight"] == found.coefficients["1.weight"]


def test_padded_tokens_and_several_labels():
    class Tokens(nn.Linear):
        def forward(self, values, attention_mask=None):
            return super().forward(values)

    torch.manual_seed(0)
    model, state = Tokens(3, 4), {"weight": torch.randn(4, 3), "bias": torch.zeros(4)}
    values, mask = torch.randn(1, 3, 3), torch.tensor([[1, 1, 0]])
    entropies = []
    for batch in ({"values": values[:, :2]}, {"values": values, "attention_mask": mask}):
        entropies.append(learn_coefficients(model, model, [state], [[batch]], num_steps=1, disable_tqdm=True).history)
    assert entropies[0] == pytest.approx(entropies[1])
    model.config = type("Config", (), {"problem_type": "multi_label_classification"})
    found = learn_coefficients(model, model, [state], [[values[0]]], num_steps=1, initial=1.0, disable_tqdm=True)
    p = (values[0] @ state["weight"].T).sigmoid()
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).sum(dim=-1).mean()
    assert found.history[0] == pytest.approx(float(expected), rel=1e-5)


def test_coefficients_are_applied_tensor_by_tensor():
    vectors, names = random_vectors(3), ["z", "y", "x"]
    coefficients = {key: [0.1 * i, 0.5, -1.0] for i, key in enumerate(vectors[0])}
    merged = merge_task_vectors(vectors, "adamerging", names=names, coefficients=coefficients)
    for key in vectors[0]:
        expected = sum(c * v[key].double() for c, v in zip(coefficients[key], vectors, strict=True))
        torch.testing.assert_close(merged[key], expected.float(), atol=1e-6, rtol=0)
    halves = merge_task_vectors(vectors, "adamerging", [0.5, 0.5, 0.5], names, coefficients=coefficients)
    for key in vectors[0]:
        torch.testing.assert_close(halves[key], merged[key] / 2, atol=1e-7, rtol=0)
    rule = get_merge_method("adamerging")
    for key in vectors[0]:
        alone = rule.function([{key: v[key]} for v in vectors], [1.0] * 3, names, coefficients=coefficients)
        assert torch.equal(alone[key], merged[key])
    for order in itertools.permutations(range(3)):
        turned = {key: [row[i] for i in order] for key, row in coefficients.items()}
        again = merge_task_vectors(
            [vectors[i] for i in order], "adamerging", names=[names[i] for i in order], coefficients=turned
        )
        assert_same(again, merged)


@pytest.mark.parametrize(
    ("coefficients", "words"),
    [
        ({}, ["no coefficients", "'scale'", "exclude"]),
        ({"scale": [0.3], "other": [0.3]}, ["[0.3]", "'scale'", "2 finite numbers"]),
        ({"scale": [0.3, float("nan")]}, ["nan", "'scale'"]),
    ],
)
def test_bad_coefficients(coefficients, words):
    vectors = [{"scale": v["scale"]} for v in random_vectors(2)]
    with pytest.raises(ValueError) as error:
        merge_task_vectors(vectors, "adamerging", coefficients=coefficients)
    message = str(error.value)
    assert all(word in message for word in words) and message.endswith("."), message


def test_bad_input(experts):
    base, models, tests = experts
    loaders = [[x] for x, _ in tests]

    def error_of(*args, **kwargs):
        with pytest.raises(ValueError) as error:
            learn_coefficients(*args, num_steps=1, disable_tqdm=True, **kwargs)
        return str(error.value)

    assert "2 modules for 3 models" in error_of(models[:2], base, models, loaders)
    assert "2 dataloaders for 3 models" in error_of(models, base, models, loaders[:2])
    assert "no batch" in error_of(models, base, models, [loaders[0], loaders[1], []])
    assert "'x'" in error_of(models, base, models, {"x": loaders[0]}, names=list(TASKS))
    assert "no task" in error_of(models, base, models, {}, names=list(TASKS))
    assert "2 names for 3" in error_of(models, base, models, loaders, names=["a", "b"])
    prefixed = {"model." + key: value for key, value in base.state_dict().items()}
    assert "share no parameter" in error_of(models, prefixed, models, loaders)
    assert "share no parameter" in error_of(models, base, models, loaders, exclude=["*"])
    assert "predicts numbers" in error_of(Net(1), Net(1), [Net(1)], loaders[:1])
    with pytest.raises(ValueError, match="needs a value for coefficients"):
        merge_task_vectors(random_vectors(2), "adamerging")
