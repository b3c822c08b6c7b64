"""Nothing is lost: every architecture comes out with the tensors and files that went in, and loads without a complaint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_atm.merging import merge_checkpoints

from ..testing_utils import assert_same


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    config = transformers.BertConfig(vocab_size=30, num_labels=3, **SMALL)
    return transformers.BertForSequenceClassification(config)


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    )


def llama():
    config = transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, tie_word_embeddings=True, **SMALL)
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(vocab_size=30, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def clip():
    text = {"vocab_size": 30, **SMALL}
    vision = {"image_size": 8, "patch_size": 4, **SMALL}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


FAMILIES = {function.__name__: function for function in (bert, vit, gpt2, llama, t5, resnet, clip)}


def save(folder, build, seed):
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    model.save_pretrained(folder)
    if hasattr(model, "generation_config") and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"):
        (folder / name).write_text(f"{name} of {folder.name}")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"no")
    return folder


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_is_lost(family, method, tmp_path):
    folders = [save(tmp_path / name, FAMILIES[family], seed) for seed, name in enumerate(("base", "one", "two"))]
    base = load_file(folders[0] / "model.safetensors")
    recipe = {"merge_method": method, "base_model": str(folders[0]), "models": [str(folder) for folder in folders[1:]]}
    report = merge_checkpoints(recipe, tmp_path / "out", reload=True, progress=False)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: (t.shape, t.dtype) for key, t in merged.items()} == {
        key: (t.shape, t.dtype) for key, t in base.items()
    }
    assert all(bool(torch.isfinite(t).all()) for t in merged.values())
    floats = [key for key, t in merged.items() if t.is_floating_point() and t.unique().numel() > 1]
    moved = [key for key in floats if not torch.equal(merged[key], base[key])]
    # A trim over the whole model may leave a small tensor where it was.
    assert moved == floats if method == "task_arithmetic" else len(moved) > len(floats) / 2
    assert all(bool((t >= 0).all()) for key, t in merged.items() if key.endswith("running_var"))
    loader = type(FAMILIES[family]())
    assert report.reloaded_as == loader.__name__
    model, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    # Names in memory may differ from those in files; what is loaded and saved again may not.
    model.save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), merged)
    assert sorted(report.side_files) == sorted(
        path.relative_to(folders[0]).as_posix()
        for path in folders[0].rglob("*")
        if path.is_file() and path.name not in ("model.safetensors", "optimizer.pt")
    )
    assert all((tmp_path / "out" / name).read_bytes() for name in report.side_files)


def test_tokenizer_of_a_model_and_code_on_request(tmp_path):
    for seed, name in enumerate(("base", "one")):
        save(tmp_path / name, bert, seed)
    (tmp_path / "base" / "modeling_own.py").write_text("print('hello')")
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    recipe = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "one")], "tokenizer_source": "one"}
    report = merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json of one"
    assert not (tmp_path / "out" / "added_tokens.json").exists()
    assert not (tmp_path / "out" / "modeling_own.py").exists() and "modeling_own.py" in report.notes[-1]
    merge_checkpoints({**recipe, "copy_code": True}, tmp_path / "code", progress=False)
    assert (tmp_path / "code" / "modeling_own.py").exists()
    record = json.loads((tmp_path / "code" / "merge_config.json").read_text())
    assert record["reloaded_as"].startswith("not reloaded")


def test_a_result_that_would_not_load_is_refused(tmp_path):
    for seed, name in enumerate(("base", "one")):
        save(tmp_path / name, llama, seed)
    # The base's head is a copy of its embeddings but not tied to them; the model's is missing.
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    recipe = {"base_model": str(tmp_path / "base"), "models": [str(tmp_path / "one")]}
    with pytest.raises(RuntimeError, match="missing keys.*lm_head.weight"):
        merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
