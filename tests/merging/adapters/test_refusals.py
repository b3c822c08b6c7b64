"""Whatever has no exact update, or cannot be read, ends in one sentence before any work."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from hf_atm.merging import merge_adapters

from .testing_utils import Toy, adapted, base_model, pair, toy_adapters


@pytest.fixture
def folder(tmp_path):
    toy_adapters(1)[0].save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "average"}, "Unknown merge method 'average'.*mean"),
        ({"method": "ties", "desnity": 0.2}, "desnity.*density"),
        ({"method": "ties", "density": 1.5}, r"density=1\.5"),
        ({"weights": [1.0]}, "1 weights for 2 models"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"weights": [1.0, -1.0]}, "sum to zero"),
        ({"output": "dense"}, "output='dense' is unknown.*'cat', 'svd', 'delta', 'residual'"),
        ({"space": "small"}, "space='small' is unknown.*'core', 'full', 'knots'"),
        ({"method": "tsv_m", "space": "knots"}, "space='knots' is for elementwise.*'tsv_m' is spectral"),
        ({"svd_rank": 2}, "svd_rank=2 is only for output='svd'"),
        ({"output": "svd", "svd_rank": 0}, "svd_rank=0 must be a positive integer"),
        ({"output": "svd", "svd_rank": True}, "svd_rank=True must be a positive integer"),
        (
            {"output": "svd", "svd_rank": 5},
            "svd_rank=5 exceeds the exact rank of this merge, which is 4.*output='cat'",
        ),
        ({"names": ["one"]}, "1 names for 2 models"),
        ({"names": ["one", "one"]}, "must differ.*'one'"),
        ({"scaling_coefficient": "big"}, "scaling_coefficient='big'"),
        ({"dtype": torch.int8}, "dtype=torch.int8 must be one of"),
    ],
)
def test_wrong_arguments(arguments, message):
    adapters = [pair(model) for model in toy_adapters(2)]
    with pytest.raises((ValueError, KeyError), match=message):
        merge_adapters(adapters, **arguments)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], "adapters is empty"),
        ("./one", "must be a list of adapters"),
        ({"one": "./one"}, "must be a list of adapters"),
        ([3], "Adapter 0 is a int"),
        ([(LoraConfig(), 3)], "Adapter 0 must be a .LoraConfig, state_dict. pair"),
        (["./nowhere"], "'./nowhere' is neither a folder nor a Hub adapter"),
    ],
)
def test_what_is_no_adapter(adapters, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters(adapters)


def test_models_with_several_adapters_must_say_which():
    model = toy_adapters(1)[0]
    model.add_adapter("second", LoraConfig(target_modules=["first"], r=2))
    with pytest.raises(ValueError, match="'default', 'second'.*say which"):
        merge_adapters([model])
    with pytest.raises(ValueError, match="no adapter 'third'; it has 'default', 'second'"):
        merge_adapters([(model, "third")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "uses use_dora, which has no exact low-rank update"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which moved the base weights.*path_initial_model"),
        ({"init_lora_weights": "olora"}, "initialised by 'olora'"),
    ],
)
def test_variants_are_refused_by_name(config, message, tmp_path):
    model = adapted(base_model("toy"), 1, ["first"], **config)
    with pytest.raises(ValueError, match=message):
        merge_adapters([pair(model)])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        merge_adapters([tmp_path / "adapter"])


@pytest.mark.parametrize("option", ["kasa_config", "velora_config", "arrow_config", "target_parameters"])
def test_options_in_the_file_are_refused_by_name(option, folder):
    edit_config(folder, **{option: {"some": "setting"}})
    with pytest.raises(ValueError, match=f"uses {option}, which has no exact low-rank update"):
        merge_adapters([folder])


def test_a_configuration_that_peft_refuses(folder):
    edit_config(folder, task_type="GUESSING")
    with pytest.raises(ValueError, match="no valid LoraConfig .*GUESSING"):
        merge_adapters([folder])


def test_adapters_that_are_not_lora(tmp_path):
    config = IA3Config(target_modules=["first"], feedforward_modules=["first"])
    model = get_peft_model(Toy(), config)
    model.save_pretrained(tmp_path / "ia3")
    for adapter in (tmp_path / "ia3", model, (config, get_peft_model_state_dict(model))):
        with pytest.raises(ValueError, match="type IA3, not LORA.*merge_state_dicts"):
            merge_adapters([adapter])


def test_options_of_a_newer_peft_are_not_ignored(folder):
    edit_config(folder, use_wonderful_lora=True, use_harmless_lora=False)
    with pytest.raises(ValueError, match="'use_wonderful_lora'.*does not know.*upgrade PEFT") as error:
        merge_adapters([folder])
    assert "harmless" not in str(error.value)


def test_folders_without_configuration_or_weights(folder):
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        merge_adapters([folder])
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json .*cannot be read"):
        merge_adapters([folder])
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="no adapter_config.json"):
        merge_adapters([folder])


def test_pickles_are_never_read(folder):
    (folder / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    torch.save({"bomb": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="only adapter_model.bin, a pickle.*safetensors"):
        merge_adapters([folder])


@pytest.mark.parametrize("kept", [0.9, 0.0])
def test_truncated_files(folder, kept):
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="adapter_model.safetensors of .*damaged or truncated"):
        merge_adapters([folder])


def edited(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    return folder


KEY = "base_model.model.first.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[KEY].view(-1)[3:4].fill_(float("nan")), f"Tensor '{KEY}' of .*not finite"),
        (lambda s: s.update({KEY: s[KEY].to(torch.int8)}), "'first'.*quantised factors .torch.int8"),
        (lambda s: s.update({KEY: s[KEY].to(torch.float8_e4m3fn)}), "'first'.*quantised factors"),
        (lambda s: s.update({KEY: torch.ones(3, 12)}), r"'first'.*\(3, 12\).*do not multiply"),
        (lambda s: s.pop(KEY), "'first.lora_B.weight', which are no pair"),
        (
            lambda s: s.update({"base_model.model.first.lora_magnitude_vector": torch.ones(20)}),
            "lora_magnitude_vector",
        ),
        (lambda s: [s.pop(name) for name in list(s)] and s.update({"x": torch.ones(1)}), "no LoRA factors"),
    ],
)
def test_tensors_that_make_no_update(folder, change, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters([edited(folder, change)])


def test_ranks_that_contradict_the_configuration(folder):
    edit_config(folder, r=4)
    with pytest.raises(ValueError, match="'first'.*rank 2, but its configuration says 4"):
        merge_adapters([folder])


def test_live_names_are_explained():
    model = toy_adapters(1)[0]
    with pytest.raises(ValueError, match="lora_A.default.weight.*get_peft_model_state_dict"):
        merge_adapters([(model.peft_config["default"], model.state_dict())])


def test_different_base_models(tmp_path):
    for name, source in (("one", "org/base"), ("two", "org/base-chat"), ("three", "org/base")):
        model = toy_adapters(1)[0]
        model.peft_config["default"].base_model_name_or_path = source
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"'org/base' \(.*one\), 'org/base-chat' \(.*two\); pass strict=False"):
        merge_adapters([tmp_path / "one", tmp_path / "two"])
    with pytest.warns(UserWarning, match="taken for copies of one"):
        merge_adapters([tmp_path / "one", tmp_path / "two"], strict=False)
    merged = merge_adapters([tmp_path / "one", tmp_path / "three"])
    assert merged.config.base_model_name_or_path == "org/base"


def test_shapes_of_another_base_model():
    class Wide(Toy):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 24)
            self.second = nn.Linear(24, 10)

    models = [toy_adapters(1)[0], adapted(Wide(), 2, ["first", "second"])]
    with pytest.raises(ValueError, match=r"'first' is \(\d+, 12\) in 'adapter \d' but \(\d+, 12\).*one base model"):
        merge_adapters([pair(model) for model in models])


def test_layers_that_factors_do_not_describe():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 6, 3, groups=2)
            self.attention = nn.MultiheadAttention(8, 2)

    for target, message in (("grouped", "grouped convolutions"), ("attention", "nn.MultiheadAttention")):
        model = get_peft_model(Odd(), LoraConfig(target_modules=[target], r=2))
        with pytest.raises(ValueError, match=message):
            merge_adapters([pair(model)])


def test_overflow_of_a_narrow_result():
    models = toy_adapters(2)
    with torch.no_grad():
        models[0].base_model.model.first.lora_B["default"].weight.fill_(6e4)
    adapters = [pair(model) for model in models]
    with pytest.raises(ValueError, match="overflows torch.float16; pass a wider dtype"):
        merge_adapters(adapters, "task_arithmetic", dtype=torch.float16)


def test_inputs_are_not_changed():
    model = toy_adapters(1)[0]
    config, state = pair(model)
    before = copy.deepcopy((config.to_dict(), state))
    merge_adapters([(config, state), pair(toy_adapters(2)[1])], "ties", output="svd")
    assert config.to_dict() == before[0]
    assert all(torch.equal(state[key], before[1][key]) for key in state)
