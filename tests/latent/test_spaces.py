from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_atm.latent import EmbeddingSet, LatentSpace


def make(ids=("b", "a", "é"), **changes):
    values = {"task": "t", "ids": list(ids), "embeddings": torch.arange(6.0).reshape(3, 2), "labels": [1, 0, -1]}
    return EmbeddingSet(**{**values, **changes})


def test_rows_are_found_chosen_and_left_out_by_id():
    space = make(own=torch.tensor([True, False, True]))
    chosen = space.select(["é", "b"])
    assert chosen.ids.tolist() == ["é", "b"] and chosen.embeddings.tolist() == [[4, 5], [0, 1]]
    assert chosen.labels.tolist() == [-1, 1] and chosen.own.tolist() == [True, True]
    assert space.drop(["a", "nobody"]).ids.tolist() == ["b", "é"]
    assert len(space.drop([])) == 3
    with pytest.raises(KeyError, match="the space 't' lacks the ids 'c'"):
        space.select(["a", "c"])


@pytest.mark.parametrize("ids", [["b", "a", "é"], ["", "xy", "z"], [7, 2, 5]])
def test_a_set_survives_the_disk(tmp_path, ids):
    space = make(ids, own=torch.tensor([True, False, True]))
    space.save(tmp_path / "deep" / "set.safetensors")
    back = EmbeddingSet.load(tmp_path / "deep" / "set.safetensors")
    assert back.task == "t" and back.ids.tolist() == ids and back.ids.dtype.kind == space.ids.dtype.kind
    for field in ("embeddings", "labels", "own"):
        assert torch.equal(getattr(back, field), getattr(space, field))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set.safetensors"]
    written = set()
    for _ in range(9):
        space.save(tmp_path / "again.safetensors")
        written.add((tmp_path / "again.safetensors").read_bytes())
    assert len(written) == 1
    make(ids, labels=None).save(tmp_path / "set.safetensors")
    assert EmbeddingSet.load(tmp_path / "set.safetensors").labels is None


def test_an_aggregate_survives_the_disk(tmp_path):
    space = LatentSpace(
        np.array([1, 2]),
        torch.rand(2, 3),
        None,
        torch.tensor([[True, False], [True, True]]),
        ["x", "y"],
        ["p", "q", "r"],
    )
    space.save(tmp_path / "space.safetensors")
    back = LatentSpace.load(tmp_path / "space.safetensors")
    assert torch.equal(back.embeddings, space.embeddings) and torch.equal(back.sources, space.sources)
    assert (back.tasks, back.anchors.tolist(), back.ids.tolist()) == (["x", "y"], ["p", "q", "r"], [1, 2])
    with pytest.raises(ValueError, match="holds LatentSpace, not EmbeddingSet"):
        EmbeddingSet.load(tmp_path / "space.safetensors")


def test_files_that_are_no_spaces(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; save a space there first"):
        LatentSpace.load(tmp_path / "nowhere")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no latent space, not LatentSpace"):
        LatentSpace.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        LatentSpace.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ""}, "The task of an embedding set is ''; give it a name"),
        ({"ids": ["a", "b", "a"]}, "the space 't' holds the ids 'a' more than once"),
        ({"ids": ["a", "b"]}, "has 2 ids and 3 embeddings"),
        ({"ids": ["a", 1, "b"]}, "mix text and int"),
        ({"ids": [0.5, 1.0, 2.0]}, "must be whole numbers or text, not float64"),
        ({"ids": [[1], [2], [3]]}, r"one row of whole numbers or of text, not of shape \(3, 1\)"),
        ({"embeddings": torch.ones(3)}, r"have shape \(3,\), not \(rows, width\)"),
        ({"embeddings": torch.tensor([[1.0], [float("nan")], [2.0]])}, "not finite, at the ids 'a'"),
        ({"embeddings": torch.tensor([[1.0], [2.0], [float("inf")]])}, "not finite, at the ids 'é'"),
        ({"embeddings": torch.tensor([[1.0], [2.0], [1e300]], dtype=torch.float64)}, "not finite, at the ids 'é'"),
        ({"labels": [0, 1]}, "must be 3 classes"),
        ({"labels": [0.0, 1.0, 2.0]}, "must be 3 classes, whole numbers from 0, not torch.float32"),
        ({"labels": [0, 1, -100]}, "has the label -100; classes count from 0, and -1 is an unknown one"),
        ({"own": [1, 0, 1]}, "must hold 3 times true or false"),
        ({"own": [True]}, "must hold 3 times true or false"),
    ],
)
def test_bad_input_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**changes)
    assert str(error.value).count(". ") == 0
