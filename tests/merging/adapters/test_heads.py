"""Modules that adapters save whole: nothing of them is lost silently."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification

from hf_atm.merging import merge_adapters

from .testing_utils import Toy, adapted, assert_updates, base_model, loaded_update, pair, true_update


NAMES = ["left", "right"]


def toy_with_heads(**changes):
    base = base_model("toy")
    config = {"modules_to_save": ["classifier"], **changes}
    return base, [adapted(base, seed, ["first", "second"], **config) for seed in (1, 2)]


def merge(models, **kwargs):
    return merge_adapters([pair(model) for model in models], names=NAMES, **kwargs)


def head(model):
    return {name: tensor for name, tensor in pair(model)[1].items() if "classifier" in name}


def test_different_heads_must_be_decided():
    _, models = toy_with_heads()
    with pytest.raises(ValueError, match="different task heads, 'classifier'.*'separate'.*adapter.*'merge'"):
        merge(models)
    with pytest.raises(ValueError, match="heads='mine' is unknown.*'error'.*'left'.*'right'"):
        merge(models, heads="mine")


def test_separate_heads_load_with_each_task(tmp_path):
    base, models = toy_with_heads()
    merged = merge(models, heads="separate")
    merged.save_pretrained(tmp_path / "merged")
    assert not any("classifier" in name for name in load_file(tmp_path / "merged" / "adapter_model.safetensors"))
    plain = loaded_update(base, tmp_path / "merged")
    x = torch.randn(4, 12)
    for name, model in zip(NAMES, models, strict=True):
        folder = tmp_path / "merged" / "tasks" / name
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        for key, tensor in head(model).items():
            assert torch.equal(pair(loaded)[1][key], tensor)
        folded = copy.deepcopy(base)
        merge(models, output="delta", heads="separate").apply_to(folded, task=name)
        with torch.no_grad():
            assert (loaded(x) - folded(x)).abs().max() <= 1e-5
    mean = [true_update(base, model) for model in models]
    assert_updates(plain, {key: (mean[0][key] + mean[1][key]) / 2 for key in ("first.weight", "second.weight")})
    assert merged.report["saved"] == {"classifier": "separate"}


def test_heads_are_averaged_or_taken_on_request(tmp_path):
    base, models = toy_with_heads()
    for choice in ("merge", "right"):
        merged = merge(models, weights=[3.0, 1.0], heads=choice)
        merged.save_pretrained(tmp_path / choice)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / choice))
        for key, tensor in head(loaded).items():
            left, right = (head(model)[key] for model in models)
            expected = right if choice == "right" else 0.75 * left + 0.25 * right
            assert (tensor - expected).abs().max() <= 1e-7


def test_heads_of_sequence_classifiers(tmp_path):
    base = base_model("bert")
    models = []
    for labels, seed in ((3, 1), (2, 2)):
        config = copy.deepcopy(base.config)
        config.num_labels = labels
        torch.manual_seed(seed)
        other = BertForSequenceClassification(config)
        other.bert.load_state_dict(base.bert.state_dict())
        models.append(adapted(other, seed, ["query"], task_type=TaskType.SEQ_CLS))
    with pytest.raises(ValueError, match="'classifier'"):
        merge(models)
    with pytest.raises(ValueError, match=r"'classifier' has different shapes.*\(3, 16\).*heads='separate'"):
        merge(models, heads="merge")
    merge(models, heads="separate").save_pretrained(tmp_path / "merged")
    merge(models, heads="left").save_pretrained(tmp_path / "left")
    assert (
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "merged")).peft_config["default"].task_type
        is None
    )
    for folder in (tmp_path / "left", tmp_path / "merged" / "tasks" / "left"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        assert loaded.peft_config["default"].task_type == TaskType.SEQ_CLS
        for key, tensor in head(models[0]).items():
            assert torch.equal(pair(loaded)[1][key], tensor)


def test_equal_heads_need_no_decision(tmp_path):
    base, models = toy_with_heads()
    models[1].base_model.model.classifier.load_state_dict(models[0].base_model.model.classifier.state_dict())
    merged = merge(models)
    assert merged.report["saved"] == {"classifier": "same"}
    merged.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "merged"))
    assert all(torch.equal(pair(loaded)[1][key], tensor) for key, tensor in head(models[0]).items())


def test_a_head_that_one_adapter_has_is_kept(tmp_path):
    base = base_model("toy")
    models = [adapted(base, 1, ["first"], modules_to_save=["classifier"]), adapted(base, 2, ["first"])]
    merged = merge(models)
    assert merged.report["saved"] == {"classifier": "only left"}
    merged.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "merged"))
    assert all(torch.equal(pair(loaded)[1][key], tensor) for key, tensor in head(models[0]).items())


def test_other_saved_modules_take_the_mean_whatever_the_method(tmp_path):
    base = base_model("toy")
    models = [adapted(base, seed, ["first"], modules_to_save=["second"]) for seed in (1, 2)]
    merged = merge(models, method="ties", weights=[1.0, 3.0])
    assert merged.report["saved"] == {"second": "mean"}
    merged.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "merged"))
    left, right, both = (pair(model)[1]["base_model.model.second.weight"] for model in (*models, loaded))
    assert (both - (0.25 * left + 0.75 * right)).abs().max() <= 1e-7
    folded = merge(models, output="delta", weights=[1.0, 3.0]).apply_to(copy.deepcopy(base))
    assert torch.equal(folded.second.weight, both)
    with pytest.raises(ValueError, match="sum to zero.*'second' has no mean"):
        merge(models, method="task_arithmetic", weights=[1.0, -1.0])


def test_a_saved_module_that_some_lack_is_an_error_unless_told_otherwise():
    base = base_model("toy")
    models = [adapted(base, 1, ["first"], modules_to_save=["second"]), adapted(base, 2, ["first"])]
    with pytest.raises(ValueError, match="'second' is missing in 'right'.*strict=False"):
        merge(models)
    with pytest.warns(UserWarning, match="'second' is missing in 'right'"):
        merged = merge(models, strict=False)
    assert torch.equal(merged.saved["second.weight"], pair(models[0])[1]["base_model.model.second.weight"])


def test_a_module_is_adapted_or_saved_but_not_both():
    base = base_model("toy")
    models = [adapted(base, 1, ["first"], modules_to_save=["second"]), adapted(base, 2, ["first", "second"])]
    with pytest.raises(ValueError, match="'second.weight' is saved whole in 'adapter 0' but adapted.*'adapter 1'"):
        merge(models, strict=False)


def test_trained_biases_take_the_mean(tmp_path):
    base = base_model("toy")
    models = [adapted(base, seed, ["first"], bias="lora_only") for seed in (1, 2)]
    with torch.no_grad():
        for index, model in enumerate(models):
            model.base_model.model.first.base_layer.bias.fill_(float(index))
    merged = merge(models)
    assert merged.report["saved"] == {"first.base_layer": "mean"}
    merged.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "merged"))
    assert torch.equal(loaded.base_model.model.first.base_layer.bias, torch.full((20,), 0.5))


def test_statistics_of_saved_normalisation_are_pooled():
    class WithNorm(Toy):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(10)

    base = WithNorm()
    models = []
    for seed in (1, 2):
        model = get_peft_model(
            copy.deepcopy(base), LoraConfig(target_modules=["first"], modules_to_save=["norm"], r=2)
        )
        model.base_model.model.norm.modules_to_save["default"].running_mean.fill_(float(seed))
        model.base_model.model.norm.modules_to_save["default"].num_batches_tracked.fill_(seed)
        models.append(model)
    saved = merge(models).saved
    assert torch.equal(saved["norm.running_mean"], torch.full((10,), 1.5))
    assert torch.equal(saved["norm.running_var"], torch.full((10,), 1.25))
    assert saved["norm.num_batches_tracked"] == 2


def test_folders_of_tasks_need_names_that_are_folder_names(tmp_path):
    _, models = toy_with_heads()
    merged = merge_adapters([pair(model) for model in models], heads="separate")
    with pytest.raises(ValueError, match="no folder names; give names="):
        merged.save_pretrained(tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no head of 'third'.*'left', 'right'"):
        merge(models, heads="separate").state_dict("third")
