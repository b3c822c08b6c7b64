from __future__ import annotations

import numpy as np
import pytest
import torch
from modeling_families import FAMILIES, make_backbone
from transformers import AutoConfig

from hf_atm import MultiTaskConfig, MultiTaskModel
from hf_atm.multi_task_config import check_labels, classification_loss


def test_json_round_trip(tmp_path):
    config = MultiTaskConfig(
        backbone_config=FAMILIES["vit"].config(),
        tasks={
            "zebra": {"labels": [f"kind {index}" for index in range(12)], "metrics": ["accuracy"]},
            "ant": {"num_labels": 1},
            "tags": {"num_labels": 3, "problem_type": "multi_label_classification"},
        },
        task_specific_modules=["layernorm"],
        pooling="cls",
    )
    config.save_pretrained(tmp_path)
    for loaded in (MultiTaskConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MultiTaskConfig
        assert loaded.tasks == config.tasks and list(loaded.tasks) == ["zebra", "ant", "tags"]
        assert loaded.tasks["zebra"]["id2label"][11] == "kind 11" and loaded.tasks["zebra"]["num_labels"] == 12
        assert loaded.tasks["ant"]["problem_type"] == "regression"
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert loaded.backbone_config.patch_size == 4
        assert loaded.task_specific_modules == ["layernorm"] and loaded.pooling == "cls"


def test_default_configuration_is_empty():
    config = MultiTaskConfig()
    assert config.tasks == {} and config.backbone_config is None
    with pytest.raises(ValueError, match="backbone_config"):
        MultiTaskModel(config)


def test_configurations_do_not_share_state():
    spec = {"num_labels": 2}
    first, second = MultiTaskConfig(tasks={"a": spec}), MultiTaskConfig(tasks={"a": spec})
    first.tasks["a"]["num_labels"] = 9
    first.task_specific_modules.append("x")
    assert second.tasks["a"]["num_labels"] == 2 and spec == {"num_labels": 2}
    assert second.task_specific_modules == []


@pytest.mark.parametrize("name", ["", "  ", "a.b", "a/b", 3])
def test_bad_task_names(name):
    with pytest.raises(ValueError, match="rename the task"):
        MultiTaskConfig(tasks={name: {"num_labels": 2}})


@pytest.mark.parametrize("name", ["keys", "train", "forward", "training"])
def test_names_that_a_module_dict_cannot_hold(name):
    with pytest.raises(ValueError, match="rename the task"):
        MultiTaskConfig(tasks={name: {"num_labels": 2}})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (2, "must be a dict"),
        ({}, "num_labels must be"),
        ({"num_labels": 0}, "num_labels must be"),
        ({"num_labels": 2.0}, "num_labels must be"),
        ({"num_labels": True}, "num_labels must be"),
        ({"num_labels": 2, "problem_type": "ranking"}, "unknown problem_type 'ranking'"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "2 or more"),
        ({"num_labels": 2, "label2id": {"a": 0, "b": 1, "c": 2}}, "num_labels is 2, but there are 3"),
        ({"labels": ["a", "a"]}, "distinct"),
        ({"label2id": {"a": 1, "b": 2}}, "numbered from 0"),
        ({"num_labels": 2, "head": "prototype"}, "unknown head"),
    ],
)
def test_bad_specifications(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        MultiTaskConfig(tasks={"sst2": spec})
    assert "'sst2'" in str(error.value)


def test_bad_pooling_is_found_before_loading():
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        MultiTaskModel.from_backbone("no/such-model", {"a": {"num_labels": 2}}, pooling="max")
    with pytest.raises(ValueError, match="from_clip"):
        MultiTaskModel.from_backbone("no/such-model", {"a": {"num_labels": 2, "head": "zero_shot"}})


def test_loss_by_hand():
    logits = torch.tensor([[1.0], [3.0]])
    # A column against a flat vector must not broadcast to 2 x 2: errors are 1 and 1, and broadcast 1, 1, 9, 1.
    assert classification_loss(logits, torch.tensor([0, 4]), "regression") == 1.0
    assert classification_loss(logits[:1], torch.tensor([0.0]), "regression") == 1.0
    assert classification_loss(logits, torch.tensor([[0.0], [4.0]]), "regression") == 1.0
    two = torch.tensor([[0.0, np.log(3.0)], [0.0, 0.0]])
    expected = (-np.log(0.75) - np.log(0.5)) / 2
    for kind in (None, "single_label_classification"):
        assert abs(classification_loss(two, torch.tensor([1, 0]), kind).item() - expected) < 1e-6
        assert abs(classification_loss(two, torch.tensor([[1], [0]]), kind).item() - expected) < 1e-6
    several = -(np.log(0.5) + np.log(0.75) + np.log(0.5) + np.log(0.5)) / 4
    for kind in (None, "multi_label_classification"):
        targets = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        assert abs(classification_loss(two, targets, kind).item() - several) < 1e-6
    assert abs(classification_loss(two, targets.long(), "multi_label_classification").item() - several) < 1e-6


def test_check_labels_accepts():
    single, several = "single_label_classification", "multi_label_classification"
    for labels in ([0, 1, 2], np.array([2, 1]), torch.tensor([0, 2]), torch.tensor([[0], [2]]), []):
        check_labels("t", labels, 3, single)
        check_labels("t", labels, 3, None)
    for labels in ([0.5, -3.0], [1, 2], torch.tensor([0.25], dtype=torch.bfloat16), [[1.0], [2.0]]):
        check_labels("t", labels, 1, "regression")
    check_labels("t", [[0.5, 2.0]], 2, "regression")
    for labels in ([[0.0, 1.0], [1.0, 1.0]], [[0, 1]], [[True, False]]):
        check_labels("t", labels, 2, several)
    check_labels("t", [[0.0, 1.0]], 2, None)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type", "message"),
    [
        ([0, 3, 1], 3, "single_label_classification", "label 3 is out of range.*whole numbers from 0 to 2"),
        ([0, -1], 3, None, "label -1 is out of range"),
        ([0.0, 1.0], 3, "single_label_classification", "type float64"),
        (["a", "b"], 2, None, "label 'a'|label np.str_"),
        ([0, None], 2, None, "type object"),
        ([[0, 1], [1, 0]], 2, "single_label_classification", "have shape"),
        ([0.0, float("nan")], 1, "regression", "label nan is out of range.*finite"),
        ([0.0, float("inf")], 1, "regression", "label inf"),
        ([True, False], 1, "regression", "type bool"),
        (["0.5"], 1, "regression", "needs finite numbers"),
        ([[0.0, 2.0]], 2, "multi_label_classification", "label 2.0 is out of range"),
        ([[0.0, 1.0]], 3, "multi_label_classification", "have shape"),
        ([[0, 1], [1]], 2, "multi_label_classification", "differing lengths"),
    ],
)
def test_check_labels_refuses(labels, num_labels, problem_type, message):
    with pytest.raises(ValueError, match=message) as error:
        check_labels("sst2", labels, num_labels, problem_type)
    assert "'sst2'" in str(error.value)


def test_model_checks_labels_by_task():
    model = MultiTaskModel.from_backbone(make_backbone("bert"), {"a": {"num_labels": 2}, "b": {"num_labels": 1}})
    model.check_labels("a", [0, 1])
    model.check_labels("b", [0.5])
    with pytest.raises(ValueError, match="task 'a': label 2"):
        model.check_labels("a", [0, 2])
    with pytest.raises(KeyError, match="unknown task 'c'; the model knows: a, b"):
        model.check_labels("c", [0])
