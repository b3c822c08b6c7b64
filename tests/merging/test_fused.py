from __future__ import annotations

import pytest
import torch

from hf_atm.merging import get_merge_method, merge_task_vectors
from hf_atm.merging.spectral.fused import qkv_groups, split_dimension

from .testing_utils import random_vectors


SPECTRAL = ("tsv_m", "iso_c", "iso_cts")

BLOCKS = {
    "llama": "model.layers.3.self_attn.{}_proj.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.{}.weight",
    "distilbert": "distilbert.transformer.layer.1.attention.{}_lin.weight",
}


@pytest.mark.parametrize("pattern", BLOCKS.values(), ids=BLOCKS.keys())
def test_separate_projections_are_found(pattern):
    names = [pattern.format(letter) for letter in "qkv"]
    others = [pattern.format("o"), names[0].replace("weight", "bias"), "model.norm.weight"]
    groups = qkv_groups([*others, *reversed(names)], fuse_qkv=True)
    assert names in groups and sorted(map(len, groups)) == [1, 1, 1, 3]
    assert groups == qkv_groups([*names, *others], fuse_qkv=True)
    assert qkv_groups(names, fuse_qkv=None) == [[name] for name in sorted(names)]


def test_bert_projections_and_incomplete_blocks():
    prefix = "bert.encoder.layer.{}.attention.self.{}.weight"
    whole = [prefix.format(0, name) for name in ("query", "key", "value")]
    part = [prefix.format(1, name) for name in ("query", "value")]
    assert qkv_groups([*whole, *part], True) == [whole, [part[0]], [part[1]]]


@pytest.mark.parametrize(
    ("key", "shape", "dimension"),
    [
        ("transformer.h.0.attn.c_attn.weight", (8, 24), 1),
        ("model.layers.0.self_attn.qkv_proj.weight", (24, 8), 0),
        ("encoder.layers.0.self_attn.in_proj_weight", (24, 8), 0),
        ("blocks.0.attn.qkv.weight", (24, 8), 0),
        # Grouped queries: the sizes of the three are not known.
        ("model.layers.0.self_attn.qkv_proj.weight", (16, 8), None),
        # Interleaved by head.
        ("gpt_neox.layers.0.attention.query_key_value.weight", (24, 8), None),
        ("transformer.h.0.attn.c_attn.bias", (24,), None),
        ("transformer.h.0.attn.c_proj.weight", (8, 24), None),
    ],
)
def test_which_fused_tensors_are_split(key, shape, dimension):
    assert split_dimension(key, shape) == dimension


@pytest.mark.parametrize("method", SPECTRAL)
def test_stacked_projections_merge_as_one_matrix(method):
    # Grouped queries: keys and values have fewer rows.
    shapes = {f"a.{letter}_proj.weight": (rows, 9) for letter, rows in (("q", 8), ("k", 4), ("v", 4))}
    vectors = random_vectors(3, shapes, dtype=torch.float64)
    stacked = [{"w": torch.cat([v[key] for key in shapes])} for v in vectors]
    merged = merge_task_vectors(vectors, method, names="abc", fuse_qkv=True)
    expected = merge_task_vectors(stacked, method, names="abc")["w"]
    assert torch.equal(torch.cat([merged[key] for key in shapes]), expected)
    assert [merged[key].shape for key in shapes] == list(shapes.values())
    apart = merge_task_vectors(vectors, method, names="abc")
    assert not torch.allclose(apart["a.q_proj.weight"], merged["a.q_proj.weight"], atol=1e-3)


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize(("key", "dim"), [("h.0.attn.c_attn.weight", 1), ("h.0.attn.in_proj_weight", 0)])
def test_fused_projections_merge_apart(method, key, dim):
    shape = (6, 18) if dim == 1 else (18, 6)
    vectors = random_vectors(3, {key: shape, "h.0.attn.c_attn.bias": (18,)}, dtype=torch.float64)
    merged = merge_task_vectors(vectors, method, names="abc", fuse_qkv=False)[key]
    pieces = [
        merge_task_vectors(
            [{"w.weight": v[key].chunk(3, dim)[index]} for v in vectors],
            method,
            names="abc",
            **({"transposed": ["w.weight"] if dim == 1 else []} if method == "iso_cts" else {}),
        )["w.weight"]
        for index in range(3)
    ]
    torch.testing.assert_close(merged, torch.cat(pieces, dim), atol=1e-12, rtol=0)
    whole = merge_task_vectors(vectors, method, names="abc")[key]
    assert not torch.allclose(whole, merged, atol=1e-3)


def test_projections_of_different_inputs_stay_apart():
    shapes = {"x.q_proj.weight": (6, 5), "x.k_proj.weight": (6, 7), "x.v_proj.weight": (6, 7)}
    vectors = random_vectors(2, shapes)
    fused, apart = (merge_task_vectors(vectors, "tsv_m", fuse_qkv=option) for option in (True, None))
    assert all(torch.equal(fused[key], apart[key]) for key in shapes)


@pytest.mark.parametrize("method", SPECTRAL)
def test_kernels_of_convolutions(method):
    vectors = random_vectors(3, {"conv.weight": (6, 3, 2, 2), "stack": (3, 4, 5)}, dtype=torch.float64)
    flat = [{"w": v["conv.weight"].flatten(1)} for v in vectors]
    mean = merge_task_vectors(vectors, "mean", names="abc")
    merged = merge_task_vectors(vectors, method, names="abc", flatten_conv=True)
    expected = merge_task_vectors(flat, method, names="abc")["w"]
    assert torch.equal(merged["conv.weight"], expected.reshape(6, 3, 2, 2))
    assert torch.equal(merged["stack"], mean["stack"])
    assert torch.equal(merge_task_vectors(vectors, method, names="abc")["conv.weight"], mean["conv.weight"])


def test_callers_are_told_which_tensors_belong_together():
    keys = ["a.k_proj.weight", "a.o_proj.weight", "a.q_proj.weight", "a.v_proj.weight"]
    for method in SPECTRAL:
        rule = get_merge_method(method)
        assert rule.partition(keys, {}) == [[key] for key in keys]
        together = rule.partition(keys, {"fuse_qkv": True, "flatten_conv": True})
        assert together == [["a.o_proj.weight"], ["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"]]
