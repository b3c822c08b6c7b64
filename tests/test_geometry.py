from __future__ import annotations

import pytest
import torch

from hf_atm.geometry import Sketch, cosines, gram_matrix, squared_norm


def test_norms_and_inner_products_are_those_of_float64():
    vectors = [{"a": torch.randn(5, 7), "b": torch.randn(3), "c": torch.randn(())} for _ in range(3)]
    flat = torch.stack([torch.cat([v[n].double().reshape(-1) for n in sorted(v)]) for v in vectors])
    assert torch.allclose(gram_matrix(vectors), flat @ flat.T, rtol=1e-12)
    assert sum(squared_norm(vectors[0][name]) for name in "abc") == pytest.approx(float(flat[0] @ flat[0]), rel=1e-12)


def test_cosines_stay_in_range_and_zero_vectors_have_none():
    same = torch.randn(4)
    found = cosines(gram_matrix([{"a": same}, {"a": 3 * same}, {"a": -same}, {"a": torch.zeros(4)}]))
    assert torch.allclose(found[0, :3], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert (found.abs() <= 1).all() and not found[3].any()


def sketched(tensors, numel):
    sketch = Sketch(numel)
    for tensor in tensors:
        sketch.add(tensor)
    return sketch.values


def test_a_short_vector_is_kept_as_it_is():
    tensors = [torch.randn(10, 20), torch.randn(7)]
    values = sketched(tensors, 207)
    assert torch.equal(values.abs(), torch.cat([t.reshape(-1) for t in tensors]).abs())


@pytest.mark.parametrize("kind", ["noise", "low rank", "sparse"])
def test_a_sketch_keeps_cosines(kind):
    generator = torch.Generator().manual_seed(3)

    def vector():
        shapes = [(1500, 768), (768,), (900, 512), (2000, 333)]
        out = []
        for shape in shapes:
            tensor = torch.randn(shape, generator=generator)
            if kind == "low rank" and len(shape) == 2:
                tensor = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
            if kind == "sparse":
                tensor *= torch.rand(shape, generator=generator) < 0.01
            out.append(tensor)
        return out

    first, other = vector(), vector()
    second = [0.4 * a + b for a, b in zip(first, other, strict=True)]
    numel = sum(t.numel() for t in first)
    assert numel > 5 * Sketch.width
    flat = [torch.cat([t.reshape(-1) for t in v]).double() for v in (first, second)]
    exact = torch.nn.functional.cosine_similarity(*flat, dim=0)
    estimate = torch.nn.functional.cosine_similarity(sketched(first, numel), sketched(second, numel), dim=0)
    assert float(estimate) == pytest.approx(float(exact), abs=0.01)


def test_a_sketch_does_not_depend_on_how_the_vector_is_cut():
    whole = torch.randn(3 * Sketch.width + 17)
    pieces = list(whole.split([5, Sketch.width - 2, Sketch.width + 9, 1000, whole.numel() - 2 * Sketch.width - 1012]))
    assert torch.allclose(sketched([whole], whole.numel()), sketched(pieces, whole.numel()), atol=1e-5)
