from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_atm.merging import merge_checkpoints, merge_state_dicts
from hf_atm.merging.checkpoints.staging import STATE_NAME

from ..testing_utils import METHODS, assert_same, random_vectors
from .testing_utils import SHAPES, load_checkpoint, write_checkpoint, write_models


def states(root, count=3):
    return [load_checkpoint(root / f"m{index}") for index in range(count)], load_checkpoint(root / "base")


def in_memory(root, method, count=3, **kwargs):
    models, base = states(root, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merge_state_dicts(models, base, method, names=[f"m{index}" for index in range(count)], **kwargs)


@pytest.mark.parametrize("scale", [0.7, "norm"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_streaming_equals_memory_bit_by_bit(method, scale, tmp_path):
    recipe = write_models(tmp_path)
    parameters = {**METHODS[method], "scaling_coefficient": scale}
    report = merge_checkpoints(
        {**recipe, "merge_method": method, "parameters": parameters}, tmp_path / "out", threads=2, progress=False
    )
    expected = in_memory(tmp_path, method, scaling_coefficient=scale, **METHODS[method])
    assert_same(load_checkpoint(tmp_path / "out"), expected)
    assert report.tensors == len(expected) and report.merged == len(expected) - 1 and report.copied == 1
    assert not (tmp_path / "out.incomplete").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "merge_config.json",
        "model.safetensors",
    ]


def test_post_processors(tmp_path):
    specs = ["svc", {"lines": {"alpha": 0.5, "beta": 0.25}}]
    recipe = {**write_models(tmp_path), "merge_method": "task_arithmetic", "postprocess": specs}
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert_same(load_checkpoint(tmp_path / "out"), in_memory(tmp_path, "task_arithmetic", postprocess=specs))
    with pytest.raises(ValueError, match="'apha'"):
        merge_checkpoints({**recipe, "postprocess": [{"lines": {"apha": 1}}]}, tmp_path / "other")


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_statistics_from_files(method, tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": method}
    models, base = states(tmp_path)
    statistics = []
    for index, vector in enumerate(random_vectors(3, SHAPES, seed=5)):
        held = {key: tensor.square() for key, tensor in vector.items()}
        if method == "regmean":
            held = {
                key: t.flatten(1).T @ t.flatten(1) for key, t in vector.items() if key == "model.layers.0.mlp.weight"
            }
        statistics.append(held)
        save_file({key: t.contiguous() for key, t in held.items()}, tmp_path / f"s{index}.safetensors")
        recipe["models"][index]["statistics"] = str(tmp_path / f"s{index}.safetensors")
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    names = ["m0", "m1", "m2"]
    assert_same(
        load_checkpoint(tmp_path / "out"), merge_state_dicts(models, base, method, names=names, statistics=statistics)
    )
    recipe["models"][1]["statistics"] = str(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors.*no such file"):
        merge_checkpoints(recipe, tmp_path / "other")
    recipe["models"][1]["statistics"] = recipe["base_model"] + "/model.safetensors"
    with pytest.raises(ValueError, match="Statistics of"):
        merge_checkpoints(recipe, tmp_path / "other", progress=False)
    assert not (tmp_path / "other.incomplete").exists()


def test_coefficients_from_a_file(tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "adamerging"}
    models, base = states(tmp_path)
    coefficients = {key: [0.1, 0.2, 0.01 * index] for index, key in enumerate(SHAPES)}
    (tmp_path / "learnt.json").write_text(json.dumps({"coefficients": coefficients, "history": []}))
    recipe["parameters"] = {"coefficients": str(tmp_path / "learnt.json")}
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    expected = merge_state_dicts(models, base, "adamerging", names=["m0", "m1", "m2"], coefficients=coefficients)
    assert_same(load_checkpoint(tmp_path / "out"), expected)
    recipe["parameters"] = {"coefficients": "nowhere.json"}
    with pytest.raises(ValueError, match="'nowhere.json' is no readable JSON"):
        merge_checkpoints(recipe, tmp_path / "other")


def test_slerp_from_the_base_to_a_model(tmp_path):
    recipe = {**write_models(tmp_path, 1), "merge_method": "slerp", "parameters": {"t": 0.25}}
    recipe["models"].append({"model": recipe["base_model"]})
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    (model,), base = states(tmp_path, 1)
    assert_same(load_checkpoint(tmp_path / "out"), merge_state_dicts([base, model], method="slerp", t=0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_shards_and_threads_change_nothing(dtype, tmp_path):
    recipe = {**write_models(tmp_path, dtype=dtype, shards=3), "merge_method": "ties", "parameters": {"density": 0.4}}
    expected = in_memory(tmp_path, "ties", density=0.4)
    for threads, shard in ((1, "5GB"), (2, 300), (4, 2000)):
        out = tmp_path / f"out{threads}"
        report = merge_checkpoints(recipe, out, max_shard_size=shard, threads=threads, progress=False)
        assert_same(load_checkpoint(out), expected)
        assert (out / "model.safetensors.index.json").exists() == (len(report.files) > 1)
        if shard == 300:
            assert len(report.files) >= 2
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert sorted(index["weight_map"]) == sorted(expected)
            assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in expected.values())


def test_order_of_the_models_changes_nothing(tmp_path):
    recipe = write_models(tmp_path)
    for entry, weight in zip(recipe["models"], (0.3, 0.1, 0.7), strict=True):
        entry["parameters"] = {"weight": weight}
    recipe |= {"merge_method": "dare_ties", "parameters": {"density": 0.5, "min_sparse_numel": 0}}
    merge_checkpoints(recipe, tmp_path / "a", progress=False)
    merge_checkpoints({**recipe, "models": recipe["models"][::-1]}, tmp_path / "b", progress=False)
    assert_same(load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b"))


def test_masks_do_not_depend_on_where_folders_lie(tmp_path):
    results = []
    for place in ("here", "there"):
        recipe = write_models(tmp_path / place)
        recipe |= {"merge_method": "dare", "parameters": {"density": 0.5, "min_sparse_numel": 0}}
        merge_checkpoints(recipe, tmp_path / place / "out", progress=False)
        results.append(load_checkpoint(tmp_path / place / "out"))
    assert_same(*results)


def test_without_a_base(tmp_path):
    recipe = write_models(tmp_path)
    del recipe["base_model"]
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    models, _ = states(tmp_path)
    assert_same(load_checkpoint(tmp_path / "out"), merge_state_dicts(models, names=["m0", "m1", "m2"]))
    with pytest.raises(ValueError, match="'ties'.*needs a base"):
        merge_checkpoints({**recipe, "merge_method": "ties"}, tmp_path / "other")


def test_output_type_is_that_of_all_floats_and_of_the_configuration(tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "task_arithmetic", "exclude": ["*.bias"]}
    merge_checkpoints(recipe, tmp_path / "out", out_dtype="bfloat16", progress=False)
    merged = load_checkpoint(tmp_path / "out")
    assert {t.dtype for key, t in merged.items() if key != "ids"} == {torch.bfloat16}
    assert merged["ids"].dtype == torch.int64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(merged["model.layers.0.mlp.bias"], states(tmp_path)[1]["model.layers.0.mlp.bias"].bfloat16())


def test_batch_norm_statistics_are_pooled(tmp_path):
    shapes = {"bn.weight": (4,), "conv.weight": (4, 2)}
    recipe = write_models(tmp_path, 2, shapes=shapes)
    for index, name in enumerate(("base", "m0", "m1")):
        tensors = load_checkpoint(tmp_path / name)
        tensors |= {
            "bn.running_mean": torch.full((4,), float(index)),
            "bn.running_var": torch.ones(4),
            "bn.num_batches_tracked": torch.tensor(index),
        }
        write_checkpoint(tmp_path / name, tensors)
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    merged = load_checkpoint(tmp_path / "out")
    assert merged["bn.running_mean"].tolist() == [1.5] * 4 and merged["bn.running_var"].tolist() == [1.25] * 4
    assert merged["bn.num_batches_tracked"].item() == 2


def test_record_and_card(tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}
    merge_checkpoints(recipe, tmp_path / "a", progress=False)
    merge_checkpoints(recipe, tmp_path / "b", max_shard_size=300, progress=False)
    record, again = (json.loads((tmp_path / name / "merge_config.json").read_text()) for name in "ab")
    assert record["recipe"]["parameters"] == {"scaling_coefficient": 0.5} and record["scale"] == 0.5
    assert sorted(record["inputs"]) == ["base", "m0", "m1", "m2"]
    digests = {entry["xxh3_128"] for entry in record["inputs"].values()}
    assert len(digests) == 4 and record["inputs"] == again["inputs"]
    assert record["tensors"]["written"] == 7 and record["versions"]["torch"] == torch.__version__
    tensors = load_checkpoint(tmp_path / "m0")
    tensors["model.scale"] = tensors["model.scale"] + 1
    write_checkpoint(tmp_path / "m0", tensors)
    merge_checkpoints(recipe, tmp_path / "c", progress=False)
    changed = json.loads((tmp_path / "c" / "merge_config.json").read_text())["inputs"]
    assert [name for name in changed if changed[name] != record["inputs"][name]] == ["m0"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\n") and "task_arithmetic" in card and str(tmp_path) not in card


def test_dry_run_reads_headers_and_writes_nothing(tmp_path):
    recipe = {**write_models(tmp_path), "merge_method": "tsv_m"}
    before = sorted(tmp_path.rglob("*"))
    report = merge_checkpoints(recipe, tmp_path / "out", dry_run=True)
    assert report.dry_run and report.tensors == 7 and report.shapes["model.embed_tokens.weight"] == [40, 6]
    assert report.dtypes["int64"] == 5 and report.nbytes > 0 and report.peak_bytes > 0
    assert report.disk_bytes == report.nbytes and sorted(tmp_path.rglob("*")) == before
    merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == report.nbytes


def test_tensors_kept_per_model(tmp_path):
    recipe = write_models(tmp_path, 2)
    for index in range(2):
        tensors = {
            **load_checkpoint(tmp_path / f"m{index}"),
            "classifier.weight": torch.full((index + 2, 6), float(index)),
        }
        write_checkpoint(tmp_path / f"m{index}", tensors)
    with pytest.raises(ValueError, match=r"classifier.weight.*missing.*exclude"):
        merge_checkpoints(recipe, tmp_path / "out")
    merge_checkpoints({**recipe, "task_specific_modules": ["classifier.*"]}, tmp_path / "out", progress=False)
    for index in range(2):
        kept = load_file(tmp_path / "out" / "task_specific" / f"m{index}.safetensors")
        assert_same(kept, {"classifier.weight": torch.full((index + 2, 6), float(index))})
    assert "classifier.weight" not in load_checkpoint(tmp_path / "out")
    with pytest.raises(ValueError, match="'m0' has no tensor.*head"):
        merge_checkpoints({**recipe, "task_specific_modules": ["head.*"]}, tmp_path / "other")


def test_a_longer_vocabulary(tmp_path):
    recipe = {**write_models(tmp_path, 2), "merge_method": "task_arithmetic"}
    tensors = load_checkpoint(tmp_path / "m1")
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], torch.ones(2, 6)])
    write_checkpoint(tmp_path / "m1", tensors)
    with pytest.raises(ValueError, match=r"40 and 42 entries.*vocab_policy='common'"):
        merge_checkpoints(recipe, tmp_path / "out")
    merge_checkpoints({**recipe, "vocab_policy": "common"}, tmp_path / "out", progress=False)
    merged = load_checkpoint(tmp_path / "out")["model.embed_tokens.weight"]
    assert merged.shape == (40, 6)
    # The other way round, the rows that only the base has are the base's.
    base = load_checkpoint(tmp_path / "base")
    longer = {**base, "model.embed_tokens.weight": torch.cat([base["model.embed_tokens.weight"], torch.ones(3, 6)])}
    write_checkpoint(tmp_path / "base", longer)
    merge_checkpoints({**recipe, "vocab_policy": "common"}, tmp_path / "again", progress=False)
    again = load_checkpoint(tmp_path / "again")["model.embed_tokens.weight"]
    assert torch.equal(again[:40], merged) and torch.equal(again[40:], torch.ones(3, 6))
    memory = merge_state_dicts(
        states(tmp_path, 2)[0], longer, "task_arithmetic", names=["m0", "m1"], vocab_policy="common"
    )
    assert torch.equal(memory["model.embed_tokens.weight"], again)


def test_tied_heads_stored_twice_by_some(tmp_path):
    config = {"model_type": "toy", "tie_word_embeddings": True}
    recipe = {**write_models(tmp_path, 2, config=config), "merge_method": "dare", "parameters": {"density": 0.5}}
    merge_checkpoints(recipe, tmp_path / "once", progress=False)
    expected = load_checkpoint(tmp_path / "once")
    tensors = load_checkpoint(tmp_path / "m1")
    double = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_checkpoint(tmp_path / "m1", double, config)
    report = merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert any("lm_head.weight" in note for note in report.notes)
    assert_same(load_checkpoint(tmp_path / "out"), expected)
    # Where every file holds both, both are written, and are one tensor still.
    for name in ("base", "m0"):
        tensors = load_checkpoint(tmp_path / name)
        double = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        write_checkpoint(tmp_path / name, double, config)
    merge_checkpoints(recipe, tmp_path / "both", progress=False)
    merged = load_checkpoint(tmp_path / "both")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    # A head of its own is merged as such.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_checkpoint(tmp_path / "m0", tensors, config)
    merge_checkpoints({**recipe, "merge_method": "mean", "parameters": {}}, tmp_path / "apart", progress=False)
    merged = load_checkpoint(tmp_path / "apart")
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_overwrite_replaces_a_merge_and_nothing_else(tmp_path):
    recipe, out = write_models(tmp_path), tmp_path / "out"
    merge_checkpoints(recipe, out, progress=False)
    with pytest.raises(ValueError, match="already holds.*overwrite=True"):
        merge_checkpoints(recipe, out)
    merge_checkpoints({**recipe, "merge_method": "task_arithmetic"}, out, overwrite=True, progress=False)
    assert json.loads((out / "merge_config.json").read_text())["recipe"]["merge_method"] == "task_arithmetic"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m0", "m1", "m2", "out"]
    with pytest.raises(ValueError, match="already holds config.json, model.safetensors; name another folder"):
        merge_checkpoints(recipe, tmp_path / "m0", overwrite=True)
    (tmp_path / "new.incomplete").mkdir()
    (tmp_path / "new.incomplete" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="in the way"):
        merge_checkpoints(recipe, tmp_path / "new")
    assert (tmp_path / "new.incomplete" / "thesis.txt").exists() and not (
        tmp_path / "new.incomplete" / STATE_NAME
    ).exists()
