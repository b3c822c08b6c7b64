"""Recipes with `align`: models in other orders of their units merge as if they had never been reordered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_atm.alignment import Alignment, Permutation, spec_for
from hf_atm.hub import files_to_push
from hf_atm.merging import merge_checkpoints, read_recipe
from hf_atm.merging.checkpoints import merge as merge_module
from hf_atm.merging.recipes import merge_recipe

from .testing_utils import load_checkpoint


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TOKENS = {"input_ids": torch.arange(28).reshape(4, 7)}
IMAGES = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))}

# One start that needs few iterations; the default has four.
QUICK = {"starts": ["anchored"]}


def bert(labels=3):
    return BertForSequenceClassification(
        BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=labels, **SIZES)
    )


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=16, **SIZES
        )
    )


def resnet():
    config = ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    return ResNetForImageClassification(config)


def shaken(build):
    """A model with nothing at ones and zeros."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(
                    0.2 * torch.randn(value.shape).abs() if "running_var" in name else 0.2 * torch.randn_like(value)
                )
    return model


def write(model, folder, seed=None, noise=0.0):
    """The model on disk, with its units in a random order, and a little noise."""
    torch.manual_seed(0 if seed is None else seed + 1)
    state = {
        name: value + noise * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    if seed is not None:
        state = Permutation.random(spec_for(model), seed).apply(state)
    copy = type(model)(model.config)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    return str(folder)


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def merged_outputs(recipe, folder, build, inputs):
    merge_checkpoints(recipe, folder, progress=False)
    return outputs(type(build()).from_pretrained(folder), inputs)


@pytest.mark.parametrize(
    ("build", "inputs", "count"),
    [(bert, TOKENS, 2), (vit, IMAGES, 3), (llama, TOKENS, 2), (resnet, IMAGES, 3)],
    ids=["bert", "vit", "llama", "resnet"],
)
def test_reordered_copies_of_a_model_merge_into_it(build, inputs, count, tmp_path):
    model = shaken(build)
    folders = [write(model, tmp_path / f"m{seed}", seed) for seed in range(count)]
    expected, scale = outputs(model, inputs), outputs(model, inputs).abs().max()
    recipe = {"models": folders, "align": "c2m3"}
    found = merged_outputs(recipe, tmp_path / "out", build, inputs)
    assert (found - expected).abs().max() <= 1e-5 * scale
    naive = merged_outputs({"models": folders}, tmp_path / "naive", build, inputs)
    assert (naive - expected).abs().max() > 1e-2 * scale


def test_the_result_lies_in_the_frame_of_the_first_model_or_of_the_base(tmp_path):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed) for seed in range(2)]
    for place, recipe in enumerate(
        ({"models": folders}, {"models": folders[:1], "base_model": folders[1], "merge_method": "task_arithmetic"})
    ):
        merge_checkpoints({**recipe, "align": QUICK}, tmp_path / f"out{place}", progress=False)
        frame = load_checkpoint(tmp_path / f"m{place}")
        for name, tensor in load_checkpoint(tmp_path / f"out{place}").items():
            torch.testing.assert_close(tensor, frame[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_task_vectors_are_taken_in_the_frame_of_the_base(method, tmp_path):
    model = shaken(bert)
    plain = [write(model, tmp_path / f"plain{index}", noise=0.02 * (index + 1)) for index in range(2)]
    base = write(model, tmp_path / "base")
    moved = []
    for index in range(2):
        copy = type(model).from_pretrained(plain[index])
        moved.append(write(copy, tmp_path / f"moved{index}", seed=index))
    parameters = {"density": 0.5} if method == "ties" else {"scaling_coefficient": 0.3}
    names = ["a", "b"]
    recipe = {"base_model": base, "merge_method": method, "parameters": parameters}
    for out, folders, align in (("whole", plain, None), ("aligned", moved, QUICK)):
        models = [{"model": folder, "name": name} for folder, name in zip(folders, names, strict=True)]
        merge_checkpoints({**recipe, "models": models, "align": align}, tmp_path / out, progress=False)
    whole = load_checkpoint(tmp_path / "whole")
    for name, tensor in load_checkpoint(tmp_path / "aligned").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)


def test_heads_are_carried_along_and_not_matched(tmp_path):
    """Experts of different tasks: every model's own head fits the merged body."""
    model, folders, expected = shaken(bert), [], {}
    for seed, labels in enumerate((2, 4)):
        expert = bert(labels)
        body = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
        expert.load_state_dict(body, strict=False)
        folders.append(write(expert, tmp_path / f"m{seed}", seed))
        expected[f"m{seed}"] = outputs(expert, TOKENS)
    recipe = {"models": folders, "align": QUICK, "task_specific_modules": ["classifier.*"]}
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    body = load_checkpoint(tmp_path / "out")
    for seed, labels in enumerate((2, 4)):
        head = load_file(tmp_path / "out" / "task_specific" / f"m{seed}.safetensors")
        expert = bert(labels)
        expert.load_state_dict({**body, **head})
        torch.testing.assert_close(outputs(expert, TOKENS), expected[f"m{seed}"], rtol=0, atol=1e-5)


def test_the_order_of_models_changes_the_frame_and_not_the_function(tmp_path):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed, noise=0.05) for seed in range(3)]
    found = [
        merged_outputs({"models": order, "align": QUICK}, tmp_path / f"out{index}", bert, TOKENS)
        for index, order in enumerate((folders, folders[::-1]))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_models_tuned_from_one_base_are_left_as_they_are(tmp_path):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{index}", noise=0.01 * (index + 1)) for index in range(3)]
    for out, align in (("plain", None), ("aligned", QUICK)):
        result = merge_checkpoints({"models": folders, "align": align}, tmp_path / out, progress=False)
    assert set(result.alignment["moved"].values()) == {0}
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("plain", "aligned")]
    assert files[0] == files[1]


def test_record_card_and_maps(tmp_path):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed) for seed in range(2)]
    recipe = {"models": folders, "align": {"method": "c2m3", "starts": ["identity", "gauge"], "seed": 3}}
    result = merge_checkpoints(recipe, tmp_path / "out", max_shard_size=40_000, progress=False)
    assert len(result.files) > 1
    facts = json.loads((tmp_path / "out" / "merge_config.json").read_text())
    digests = [entry["xxh3_128"] for entry in facts["inputs"].values()]
    merge_checkpoints({"models": folders}, tmp_path / "naive", progress=False)
    plain = json.loads((tmp_path / "naive" / "merge_config.json").read_text())
    # Digests are those of the files, whatever order they were read in.
    assert digests == [entry["xxh3_128"] for entry in plain["inputs"].values()]
    assert "alignment" not in plain
    assert facts["alignment"] == result.alignment
    assert result.alignment["recipe"] == {"method": "c2m3", "starts": ["identity", "gauge"], "seed": 3}
    assert result.alignment["frame"] == "m0" and result.alignment["moved"]["m1"] > 0
    states = [load_checkpoint(tmp_path / f"m{seed}") for seed in range(2)]
    bodies = [[v for k, v in sorted(state.items()) if not k.startswith("classifier")] for state in states]
    before = sum(float((a.double() * b.double()).sum()) for a, b in zip(*bodies, strict=True))
    after = sum(float(a.double().square().sum()) for a in bodies[0])
    assert result.alignment["objective_before"] == pytest.approx(before, rel=1e-6)
    assert result.alignment["objective_after"] == pytest.approx(after, rel=1e-6)
    maps = Alignment.load(tmp_path / "out" / "alignment" / "alignment.safetensors")
    mapped = maps.map(1, 0).apply(states[1])
    assert all(torch.equal(mapped[name], states[0][name]) for name in mapped)
    assert Path("alignment", "alignment.safetensors") in files_to_push(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`c2m3` brought the units" in card and "2405.17897" in card and "align:" in card
    # The maps are of that merge, and no side file of a later one.
    merge_checkpoints({"models": [str(tmp_path / "out"), folders[0]]}, tmp_path / "next", progress=False)
    assert not (tmp_path / "next" / "alignment").exists()


def test_a_dry_run_checks_and_does_not_align(tmp_path, monkeypatch):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed) for seed in range(2)]
    monkeypatch.setattr(merge_module, "align_inputs", None)
    recipe = {"models": folders, "align": QUICK}
    plan = merge_checkpoints(recipe, tmp_path / "out", dry_run=True, progress=False)
    assert plan.peak_bytes > 2 * 4 * plan.parameters and plan.alignment == {}
    state = load_checkpoint(tmp_path / "m1")
    state["bert.pooler.dense.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "m1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        merge_checkpoints(recipe, tmp_path / "out", dry_run=True, progress=False)


def test_an_interrupted_merge_does_not_align_again(tmp_path, monkeypatch):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed, noise=0.05) for seed in range(2)]
    recipe = {"models": folders, "align": QUICK}
    merge_checkpoints(recipe, tmp_path / "whole", progress=False)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(recipe, tmp_path / "out", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("hf_atm.alignment.checkpoints.align_checkpoints", stop)
        assert merge_checkpoints(recipe, tmp_path / "out", progress=False).resumed
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()


def test_one_checkpoint_named_twice_counts_once(tmp_path):
    model = shaken(bert)
    folders = [write(model, tmp_path / f"m{seed}", seed, noise=0.05) for seed in range(2)]
    recipe = {"models": [*folders, {"model": folders[1], "name": "again"}], "align": QUICK}
    with pytest.raises(ValueError, match="again|names"):
        read_recipe({**recipe, "models": [*folders, folders[1]]})
    recipe["models"] = [
        {"model": folder, "name": name} for folder, name in zip([*folders, folders[1]], "abc", strict=True)
    ]
    result = merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert result.alignment["moved"]["b"] == result.alignment["moved"]["c"]


MODELS = {"models": ["./a", "./b"]}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"align": "c2m4"}, "method='c2m4'; expected one of c2m3, git-rebasin, merge-many"),
        ({"align": "activations"}, "needs data; call hf_atm.alignment.align"),
        ({"align": 3}, "must be a method or a mapping"),
        ({"align": {"methods": "c2m3"}}, "unknown key 'methods'; did you mean 'method'"),
        ({"align": {"starts": "gauge"}}, "write a list, starts: \\['gauge'\\]"),
        ({"align": {"starts": ["nowhere"]}}, "list at least one of"),
        ({"align": {"heads": "classifier.*"}}, "write a list, heads"),
        ({"align": {"max_iter": 0}}, "max_iter=0; expected a whole number of at least 1"),
        ({"align": {"tol": "small"}}, "tol='small'; expected a number"),
        (
            {"align": "c2m3", "merge_method": "ties", "parameters": {"density": 0.2}},
            "name one of the models as base_model",
        ),
        ({"align": "c2m3", "merge_method": "task_arithmetic"}, "or use .*mean"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(recipe, message):
    with pytest.raises(ValueError, match=message):
        read_recipe({**MODELS, **recipe})


def test_statistics_lie_in_each_models_own_order(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"")
    models = [{"model": f"./{name}", "statistics": str(tmp_path / "s.safetensors")} for name in "ab"]
    for method in ("fisher", "regmean"):
        with pytest.raises(ValueError, match="run hf-atm align first"):
            read_recipe({"models": models, "merge_method": method, "align": "c2m3"})


def test_models_that_cannot_be_aligned_are_refused_before_anything_is_written(tmp_path):
    first, second = (write(shaken(bert), tmp_path / name, 0) for name in ("bert", "other"))
    for kind, message in (("vit", "different types .bert, vit."), ("t5", "different types .bert, t5.")):
        config = tmp_path / "other" / "config.json"
        config.write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=message):
            merge_checkpoints({"models": [first, second], "align": "c2m3"}, tmp_path / "out", progress=False)
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="cannot be aligned: its tables of relative positions"):
        merge_checkpoints({"models": [first, second], "align": "c2m3"}, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_adapters_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    models = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(ValueError, match="'align' is for whole models: adapters of one base share its order"):
        merge_recipe({"models": models, "align": "c2m3"}, tmp_path / "out")
    with pytest.raises(ValueError, match="'align' is for whole models"):
        merge_recipe({"models": models}, tmp_path / "out", align="c2m3")
