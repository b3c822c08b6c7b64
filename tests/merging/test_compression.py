from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_atm.merging import compress_task_vector, compression_error, decompress

from .testing_utils import assert_same, random_vectors


SHAPES = {"layer.weight": (40, 30), "layer.bias": (40,), "embed.weight": (64, 30), "conv": (8, 6, 3, 3), "scale": ()}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def low_rank(shape, rank, seed=0, dtype=torch.float32):
    factors = random_vectors(1, {"l": (shape[0], rank), "r": (rank, shape[1])}, seed, torch.float64)[0]
    return (factors["l"] @ factors["r"]).to(dtype)


def entries(mapping):
    return sum(tensor.numel() for tensor in mapping.values())


def test_the_kept_triplets_are_the_best_approximation():
    vector = random_vectors(1, {"w": (40, 30)}, dtype=torch.float64)[0]
    restored = decompress(compress_task_vector(vector, rank=5))["w"]
    left, values, right = np.linalg.svd(vector["w"].numpy(), full_matrices=False)
    np.testing.assert_allclose(restored.numpy(), left[:, :5] * values[:5] @ right[:5], atol=1e-10)
    error = compression_error(vector, compress_task_vector(vector, rank=5))
    np.testing.assert_allclose(error, np.sqrt((values[5:] ** 2).sum() / (values**2).sum()), rtol=1e-9)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.4])
def test_the_ratio_is_a_share_of_the_entries(ratio):
    vector = random_vectors(1, {"a": (200, 150), "b": (90, 300), "c": (16, 8, 5, 5)})[0]
    stored = compress_task_vector(vector, ratio=ratio)
    assert 0.7 * ratio * entries(vector) < entries(stored) <= ratio * entries(vector)
    assert entries(compress_task_vector(vector)) == entries(compress_task_vector(vector, ratio=0.1))


def test_tsv_c_keeps_the_share_of_one_task():
    stored = compress_task_vector({"w": torch.randn(30, 24)}, num_tasks=4)
    assert (
        stored["left/w"].shape == (30, 6) and stored["values/w"].shape == (6,) and stored["right/w"].shape == (24, 6)
    )
    assert compress_task_vector({"w": torch.randn(30, 24)}, num_tasks=100)["values/w"].shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_matrices_come_back_exactly(dtype):
    vector = {"w": low_rank((40, 30), 3, dtype=dtype), "conv": low_rank((8, 54), 2, dtype=dtype).reshape(8, 6, 3, 3)}
    stored = compress_task_vector(vector, rank=4)
    # Directions beyond the numerical rank would be noise.
    assert stored["values/w"].shape == (3,) and stored["values/conv"].shape == (2,)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert compression_error(vector, stored) < tolerance
    for key, tensor in decompress(stored).items():
        torch.testing.assert_close(tensor, vector[key], atol=20 * tolerance, rtol=0)


def test_shapes_types_and_whole_tensors_survive_a_file(tmp_path):
    vector = random_vectors(1, SHAPES)[0]
    vector["layer.bias"] = vector["layer.bias"].bfloat16()
    stored = compress_task_vector(vector, ratio=0.2, exclude=["embed*"])
    save_file(stored, str(tmp_path / "task.safetensors"))
    loaded = load_file(str(tmp_path / "task.safetensors"))
    assert_same(loaded, stored)
    restored = decompress(loaded)
    assert list(restored) == sorted(SHAPES)
    assert {key: (t.shape, t.dtype) for key, t in restored.items()} == {
        key: (vector[key].shape, vector[key].dtype) for key in restored
    }
    for key in ("layer.bias", "embed.weight", "scale"):
        assert torch.equal(restored[key], vector[key])


def test_names_cannot_collide():
    vector = {"w": torch.randn(9, 9), "left/w": torch.randn(9, 9), "form/left/w": torch.randn(3), "": torch.randn(2)}
    restored = decompress(compress_task_vector(vector, rank=1))
    assert sorted(restored) == sorted(vector)
    assert torch.equal(restored["form/left/w"], vector["form/left/w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage(dtype):
    vector = {"w": 1e-6 * low_rank((40, 30), 3), "bias": torch.randn(7)}
    stored = compress_task_vector(vector, rank=3, dtype=dtype)
    assert stored["left/w"].dtype == stored["whole/bias"].dtype == dtype and stored["values/w"].dtype == torch.float32
    restored = decompress(stored)
    assert restored["w"].dtype == torch.float32
    assert 0 < compression_error(vector, stored) < 2e-2


def test_added_to_a_base():
    base = {"w": torch.randn(40, 30).bfloat16(), "step": torch.tensor(3), "other": torch.randn(4)}
    vector = {"w": low_rank((40, 30), 2, dtype=torch.float64)}
    model = decompress(compress_task_vector(vector, rank=2), base, scaling_coefficient=0.5)
    assert list(model) == list(base)
    assert torch.equal(model["w"], (base["w"].double() + 0.5 * vector["w"]).bfloat16())
    assert torch.equal(model["other"], base["other"]) and model["other"] is not base["other"]
    assert model["step"].dtype == torch.int64


def test_zero_one_row_and_empty_matrices():
    vector = {
        "zero": torch.zeros(20, 10),
        "row": torch.randn(1, 50),
        "column": torch.randn(50, 1),
        "none": torch.zeros(0, 4),
    }
    stored = compress_task_vector(vector)
    restored = decompress(stored)
    for key in vector:
        torch.testing.assert_close(restored[key], vector[key])
    assert compression_error(vector, stored) < 1e-6
    assert compression_error({"zero": vector["zero"]}, compress_task_vector({"zero": vector["zero"]})) == 0.0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"ratio": 0}, ["ratio=0", "between 0 and 1"]),
        ({"ratio": 1.0}, ["ratio=1.0"]),
        ({"ratio": float("nan")}, ["ratio=nan"]),
        ({"ratio": True}, ["ratio=True"]),
        ({"rank": 0}, ["rank=0", "at least 1"]),
        ({"rank": 2.5}, ["rank=2.5"]),
        ({"num_tasks": -1}, ["num_tasks=-1"]),
        ({"ratio": 0.1, "rank": 3}, ["one of", "ratio=0.1 and rank=3"]),
        ({"dtype": torch.int8}, ["int8", "floating"]),
        ({"exclude": "embed*"}, ["exclude=['embed*']"]),
    ],
)
def test_bad_budgets_are_refused_in_one_sentence(kwargs, words):
    with pytest.raises(ValueError) as error:
        compress_task_vector({"w": torch.ones(4, 4)}, **kwargs)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


def test_bad_tensors_and_files_are_refused():
    with pytest.raises(ValueError, match="'w' is torch.int64"):
        compress_task_vector({"w": torch.ones(4, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="'w'.*not finite"):
        compress_task_vector({"w": torch.full((4, 4), float("nan"))})
    with pytest.raises(ValueError, match="'w' overflows torch.float16"):
        compress_task_vector({"w": torch.full((4,), 1e6)}, dtype=torch.float16)
    stored = compress_task_vector({"w": torch.randn(40, 30)}, rank=2)
    with pytest.raises(ValueError, match="Not a compressed task vector: 'w'"):
        decompress({"w": torch.ones(2, 2)})
    for part in stored:
        with pytest.raises(ValueError, match="incomplete: parts of 'w'"):
            decompress({key: tensor for key, tensor in stored.items() if key != part})
    with pytest.raises(ValueError, match="no tensors 'w'"):
        decompress(stored, {"v": torch.ones(40, 30)})
    with pytest.raises(ValueError, match=r"'w' is \(30, 40\) in the base but \(40, 30\)"):
        decompress(stored, {"w": torch.ones(30, 40)})
    with pytest.raises(ValueError, match="scaling_coefficient=inf"):
        decompress(stored, scaling_coefficient=float("inf"))
