"""Linear merges are exact in the true updates, on real architectures and for every way of scaling an adapter."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from hf_atm import merge_adapters

from .testing_utils import (
    MODELS,
    adapted,
    assert_updates,
    base_model,
    loaded_update,
    pair,
    toy_adapters,
    true_update,
)


def summed(base, models, weights):
    updates = [true_update(base, model) for model in models]
    return {
        name: sum(w * update[name] for w, update in zip(weights, updates, strict=True) if name in update)
        for name in sorted({name for update in updates for name in update})
    }


@pytest.mark.parametrize("architecture", MODELS)
def test_the_concatenated_adapter_is_the_sum_of_the_true_updates(architecture, tmp_path):
    base, targets = base_model(architecture), MODELS[architecture][1]
    models = [
        adapted(base, 1, targets, r=2, lora_alpha=3),
        adapted(base, 2, targets, r=3, lora_alpha=5, use_rslora=True),
        adapted(base, 3, targets, r=1, lora_alpha=2),
    ]
    weights = [0.5, -1.0, 2.0]
    expected = summed(base, models, weights)
    assert len(expected) >= 2
    merged = merge_adapters([pair(model) for model in models], "task_arithmetic", weights)
    merged.save_pretrained(tmp_path / "merged")
    assert_updates(loaded_update(base, tmp_path / "merged"), expected)
    dense = merge_adapters([pair(model) for model in models], "task_arithmetic", weights, output="delta")
    assert_updates(dict(dense.deltas), expected)


CONFIGS = {
    "plain": [{"r": 2}, {"r": 2}],
    "different ranks": [{"r": 1}, {"r": 4}],
    "alpha": [{"lora_alpha": 1}, {"lora_alpha": 16}],
    "rsLoRA": [{"r": 4, "use_rslora": True}, {"r": 3, "use_rslora": True, "lora_alpha": 5}],
    "patterns": [
        {"r": 2, "rank_pattern": {"first": 5}, "alpha_pattern": {"second": 7}},
        {"r": 3, "rank_pattern": {"^second": 1}, "alpha_pattern": {"fir.*": 2}, "use_rslora": True},
    ],
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("method", ["mean", "task_arithmetic"])
def test_scales_ranks_and_patterns(case, method, tmp_path):
    base = base_model("toy")
    models = [adapted(base, seed, ["first", "second"], **config) for seed, config in enumerate(CONFIGS[case])]
    weights = [3.0, 1.0]
    shares = [0.75, 0.25] if method == "mean" else weights
    merged = merge_adapters([pair(model) for model in models], method, weights)
    merged.save_pretrained(tmp_path / "merged")
    assert_updates(loaded_update(base, tmp_path / "merged"), summed(base, models, shares))
    ranks = [model.base_model.model.first.r["default"] for model in models]
    assert merged.report["modules"]["first"]["rank"] == sum(ranks)


def test_the_loaded_adapter_computes_what_the_folded_update_computes(tmp_path):
    base = base_model("bert")
    models = [adapted(base, seed, ["query", "dense", "word_embeddings"]) for seed in (1, 2)]
    merge_adapters([pair(model) for model in models]).save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(base_model("bert"), str(tmp_path / "merged")).eval()
    folded = base_model("bert")
    merge_adapters([pair(model) for model in models], output="delta").apply_to(folded)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        difference = loaded(input_ids=ids).logits - folded(input_ids=ids).logits
        moved = loaded(input_ids=ids).logits - base(input_ids=ids).logits
    assert moved.abs().max() > 1e-3
    assert difference.abs().max() <= 1e-5


def test_loading_has_no_missing_and_no_unexpected_tensors(tmp_path):
    base = base_model("llama")
    models = [adapted(base, 1, ["q_proj", "down_proj"], r=2), adapted(base, 2, ["q_proj"], r=3)]
    merged = merge_adapters([pair(model) for model in models], strict=False)
    merged.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "merged"))
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert sorted(found) == sorted(merged.state_dict())
    for name, tensor in merged.state_dict().items():
        assert torch.equal(found[name], tensor)


def test_a_module_that_an_adapter_lacks_is_a_zero_update(tmp_path):
    base = base_model("toy")
    models = [adapted(base, 1, ["first", "second"]), adapted(base, 2, ["first"])]
    adapters = [pair(model) for model in models]
    with pytest.raises(ValueError, match="'adapter 1' does not adapt 'second'.*strict=False"):
        merge_adapters(adapters)
    with pytest.warns(UserWarning, match="zero updates.*'second'"):
        merged = merge_adapters(adapters, strict=False)
    merged.save_pretrained(tmp_path / "merged")
    assert_updates(loaded_update(base, tmp_path / "merged"), summed(base, models, [0.5, 0.5]))
    with pytest.warns(UserWarning, match="zero updates"):
        ties = merge_adapters(adapters, "ties", density=1.0, strict=False, output="delta")
    assert ties.deltas["second.weight"].abs().max() > 0


def test_shared_factors_do_not_inflate_the_update():
    base = base_model("toy")
    models = toy_adapters(4, base)
    with torch.no_grad():
        for model in models[1:]:
            for name in ("first", "second"):
                theirs = getattr(model.base_model.model, name).lora_A["default"].weight
                theirs.copy_(getattr(models[0].base_model.model, name).lora_A["default"].weight)
    merged = merge_adapters([pair(model) for model in models], output="delta")
    assert_updates(dict(merged.deltas), summed(base, models, [0.25] * 4))


def test_one_adapter_is_returned(tmp_path):
    base = base_model("toy")
    model = toy_adapters(1, base, r=3, use_rslora=True)[0]
    for output in ("cat", "svd"):
        merged = merge_adapters([pair(model)], output=output)
        merged.save_pretrained(tmp_path / output)
        assert merged.config.r == 3
        assert_updates(loaded_update(base, tmp_path / output), true_update(base, model))


def test_an_untrained_adapter_has_no_update():
    base = base_model("toy")
    models = toy_adapters(2, base)
    with torch.no_grad():
        for model in models:
            for layer in (model.base_model.model.first, model.base_model.model.second):
                layer.lora_B["default"].weight.zero_()
    for method, space in (("mean", "core"), ("ties", "core"), ("tsv_m", "core"), ("iso_c", "full"), ("ties", "knots")):
        for output in ("cat", "svd"):
            merged = merge_adapters([pair(model) for model in models], method, output=output, space=space)
            assert not any(tensor.any() for key, tensor in merged.factors.items() if ".lora_B" in key)
            assert merged.report["lost_energy"] == 0


def test_norm_is_the_length_of_a_typical_update():
    base = base_model("toy")
    models = toy_adapters(3, base)
    updates = [true_update(base, model) for model in models]

    def norm(update):
        return torch.cat([update[name].reshape(-1) for name in sorted(update)]).norm()

    expected = torch.stack([norm(update) for update in updates]).square().mean().sqrt()
    for method, space in (("mean", "core"), ("ties", "core"), ("ties", "knots"), ("ties", "full"), ("tsv_m", "core")):
        merged = merge_adapters(
            [pair(model) for model in models], method, output="delta", space=space, scaling_coefficient="norm"
        )
        assert abs(norm({k: v.double() for k, v in merged.deltas.items()}) / expected - 1) <= 1e-6
        assert merged.report["scaling_coefficient"] != 1


def test_zero_weights_take_no_part_and_no_rank():
    base = base_model("toy")
    models = toy_adapters(3, base)
    adapters = [pair(model) for model in models]
    merged = merge_adapters(adapters, "task_arithmetic", [1.0, 0.0, 2.0])
    assert merged.report["modules"]["first"]["rank"] == 4
    for method in ("ties", "tsv_m", "iso_c"):
        without = merge_adapters([adapters[0], adapters[2]], method, [1.0, 2.0], output="delta", names=["a", "c"])
        kept = merge_adapters(adapters, method, [1.0, 0.0, 2.0], output="delta", names=["a", "b", "c"])
        assert torch.equal(kept.deltas["first.weight"], without.deltas["first.weight"])
    nothing = merge_adapters(adapters, "task_arithmetic", [0.0, 0.0, 0.0], output="delta")
    assert not nothing.deltas["first.weight"].any()


def test_half_precision_inputs_are_accumulated_above_and_rounded_once():
    base = base_model("toy")
    models = [model.to(torch.bfloat16) for model in toy_adapters(3, base)]
    merged = merge_adapters([pair(model) for model in models], weights=[0.3, 0.1, 0.6], output="delta")
    expected = summed(base.to(torch.bfloat16).double(), [model.double() for model in models], [0.3, 0.1, 0.6])
    for name, tensor in merged.deltas.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float()) or (tensor - expected[name]).abs().max() <= 1e-7


def test_adapters_come_from_folders_models_and_pairs_alike(tmp_path):
    base = base_model("toy")
    models = toy_adapters(2, base)
    for name, model in zip(("one", "two"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    both = PeftModel.from_pretrained(base_model("toy"), str(tmp_path / "one"), adapter_name="one")
    both.load_adapter(str(tmp_path / "two"), adapter_name="two")
    names = ["one", "two"]
    expected = merge_adapters([pair(model) for model in models], names=names)
    for adapters in (
        [tmp_path / "one", str(tmp_path / "two")],
        both,
        [(both, "one"), (both, "two")],
        [(models[0], "default"), pair(models[1])],
        models,
    ):
        given = None if isinstance(adapters, PeftModel) or adapters[0] == tmp_path / "one" else names
        merged = merge_adapters(adapters, names=given)
        assert [entry["name"] for entry in merged.report["inputs"]] == names
        for key, tensor in expected.factors.items():
            assert torch.equal(merged.factors[key], tensor), key
    only = merge_adapters(both, names=["two"])
    assert [entry["name"] for entry in only.report["inputs"]] == ["two"]


def test_a_hub_id_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    model = toy_adapters(1)[0]
    model.save_pretrained(tmp_path / "downloaded")
    from hf_atm.merging.adapters import reading

    monkeypatch.setattr(reading, "hf_hub_download", lambda repository, name: str(tmp_path / "downloaded" / name))
    merged = merge_adapters(["someone/adapter"])
    assert merged.report["inputs"][0]["name"] == "adapter"
    assert len(merged.report["inputs"][0]["sha256"]) == 64
