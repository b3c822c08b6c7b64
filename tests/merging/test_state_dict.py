from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from hf_atm.merging import (
    merge_state_dicts,
    merge_task_vectors,
    register_merge_method,
    registry,
)
from hf_atm.merging.postprocess.registry import apply_post_processors, prepare_post_processors

from .testing_utils import METHODS, assert_same, random_vectors


class Tiny(nn.Module):
    """Convolution, BatchNorm, tied embedding and head, integer buffer, task head."""

    def __init__(self, labels=3, tie=True):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.bn = nn.BatchNorm1d(4)
        self.embed = nn.Embedding(30, 6)
        self.out = nn.Linear(6, 30, bias=False)
        if tie:
            self.out.weight = self.embed.weight
        self.fc = nn.Linear(12, 20)
        self.register_buffer("position_ids", torch.arange(5))
        self.classifier = nn.Linear(6, labels)


def models(count, seed=0, **kwargs):
    result = []
    for index in range(count):
        torch.manual_seed(seed + index)
        model = Tiny(**kwargs)
        model.bn.running_mean += torch.randn(4)
        model.bn.running_var *= 1 + torch.rand(4)
        model.bn.num_batches_tracked += index
        result.append(model)
    return result


def kwargs_for(method):
    return dict(METHODS[method])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_keys_dtypes_ties_and_reload(method):
    experts, base = models(3), models(1, seed=9)[0]
    merged = merge_state_dicts(experts, base, method, **kwargs_for(method))
    assert list(merged) == list(base.state_dict())
    assert {k: (t.shape, t.dtype) for k, t in merged.items()} == {
        k: (t.shape, t.dtype) for k, t in base.state_dict().items()
    }
    assert merged["out.weight"].data_ptr() == merged["embed.weight"].data_ptr()
    memory = {t.data_ptr() for m in (*experts, base) for t in m.state_dict().values()}
    assert not memory & {t.data_ptr() for t in merged.values()}
    Tiny().load_state_dict(merged, strict=True)
    assert torch.equal(merged["position_ids"], torch.arange(5))
    assert merged["bn.num_batches_tracked"].item() == 2
    assert bool((merged["bn.running_var"] >= 0).all())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_equals_base_plus_merged_task_vectors(method):
    experts, base = random_vectors(3, seed=1), random_vectors(1, seed=2)[0]
    names = ["a", "b", "c"]
    vectors = [{key: e[key].double() - base[key].double() for key in base} for e in experts]
    vector = merge_task_vectors(vectors, method, names=names, scaling_coefficient=0.4, **kwargs_for(method))
    merged = merge_state_dicts(experts, base, method, names=names, scaling_coefficient=0.4, **kwargs_for(method))
    for key in base:
        # Both add in float64, one of them with the factors drawn together: at most the last float32 bit may differ.
        # Matrices of float32 models are multiplied out of their singular vectors in float32.
        rounding = 1e-6 * float(vector[key].abs().max()) if method in ("iso_c", "iso_cts", "tsv_m") else 1e-15
        expected = (base[key].double() + vector[key]).float()
        torch.testing.assert_close(merged[key], expected, rtol=1.2e-7, atol=rounding)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_norm_scale_equals_that_of_the_task_vectors(method):
    experts, base = random_vectors(3, seed=1), random_vectors(1, seed=2)[0]
    names = ["a", "b", "c"]
    vectors = [{key: e[key].double() - base[key].double() for key in base} for e in experts]
    vector = merge_task_vectors(vectors, method, names=names, scaling_coefficient="norm", **kwargs_for(method))
    merged = merge_state_dicts(experts, base, method, names=names, scaling_coefficient="norm", **kwargs_for(method))
    for key in base:
        torch.testing.assert_close(merged[key], (base[key].double() + vector[key]).float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_permuted_models_are_bit_equal(method):
    experts, base, weights = models(3), models(1, seed=9)[0], [0.3, 0.1, 0.7]
    left = merge_state_dicts(experts, base, method, weights, **kwargs_for(method))
    assert_same(left, merge_state_dicts(experts[::-1], base, method, weights[::-1], **kwargs_for(method)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_model_and_copies_come_back_exactly(dtype):
    model, base = random_vectors(1, seed=3, dtype=dtype)[0], random_vectors(1, seed=4, dtype=dtype)[0]
    far = {**base, "layer.bias": base["layer.bias"] * 1e4}
    # float64 has no wider type to accumulate in, so thirds may not come back.
    for count in (1, 2, 4) if dtype == torch.float64 else (1, 2, 3, 7):
        assert_same(merge_state_dicts([model] * count), model)
        # The mean does not go through differences, so that even a far base costs no digits.
        assert_same(merge_state_dicts([model] * count, far), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype != torch.float64:
            assert_same(merge_state_dicts([model], base, "task_arithmetic"), model)


def test_zero_task_vectors_return_the_base():
    base = models(1)[0].state_dict()
    for method in sorted(METHODS):
        for scale in (1.0, "norm"):
            merged = merge_state_dicts([base, base], base, method, scaling_coefficient=scale, **kwargs_for(method))
            assert_same(merged, base)


def test_bfloat16_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    tensors = [(torch.randn(100, 200, generator=generator) * 0.02).bfloat16() for _ in range(3)]
    base, weights = {"w": tensors[0]}, [0.3, 0.1]
    experts = [{"w": tensor} for tensor in tensors[1:]]
    exact = [tensor.double() for tensor in tensors]
    mean = (0.3 * exact[1] + 0.1 * exact[2]) / 0.4
    total = exact[0] + 0.3 * (exact[1] - exact[0]) + 0.1 * (exact[2] - exact[0])
    merged = merge_state_dicts(experts, None, "mean", weights)["w"]
    assert merged.dtype == torch.bfloat16
    assert float((merged == mean.bfloat16()).float().mean()) >= 0.999
    with pytest.warns(UserWarning, match="half precision"):
        merged = merge_state_dicts(experts, base, "task_arithmetic", weights)["w"]
    assert float((merged == total.bfloat16()).float().mean()) >= 0.999


def test_output_dtype():
    half = [{"w": torch.ones(3).bfloat16(), "ids": torch.arange(2), "head": torch.ones(2).bfloat16()}] * 2
    merged = merge_state_dicts(half, dtype=torch.float32, exclude=["head"])
    assert [t.dtype for t in merged.values()] == [torch.float32, torch.int64, torch.float32]
    mixed = merge_state_dicts([{"w": torch.ones(3).bfloat16()}, {"w": torch.ones(3)}])
    assert mixed["w"].dtype == torch.float32


def test_tied_tensors_are_merged_once_and_partial_ties_apart():
    tied, loose = models(2), models(1, seed=5, tie=False)
    merged = merge_state_dicts([*tied, *loose])
    experts = [*tied, *loose]
    for key in ("embed.weight", "out.weight"):
        expected = sum(m.state_dict()[key].double() for m in experts) / 3
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-7)
    assert merged["out.weight"].data_ptr() != merged["embed.weight"].data_ptr()


def test_a_missing_tied_partner_is_filled_in():
    experts = models(2)
    stored = [{k: t for k, t in m.state_dict().items() if k != "out.weight"} for m in experts]
    merged = merge_state_dicts(stored, base=experts[0])
    assert torch.equal(merged["out.weight"], merged["embed.weight"])
    assert_same(merged, merge_state_dicts(experts, base=experts[0]))


def test_a_tied_table_is_no_matrix_under_any_of_its_names():
    weight = [torch.randn(8, 6, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    states = [{"a.decoder.weight": w, "z.embeddings.weight": w} for w in weight]
    merged = merge_state_dicts(states[1:], states[0], "iso_c")
    torch.testing.assert_close(merged["a.decoder.weight"], (weight[1] + weight[2]) / 2)


def test_batch_norm_policies():
    experts, base = models(2), models(1, seed=9)[0]
    states = [m.state_dict() for m in experts]
    pooled = merge_state_dicts(experts, base, "task_arithmetic")
    mean = (states[0]["bn.running_mean"] + states[1]["bn.running_mean"]) / 2
    second = sum(s["bn.running_var"] + s["bn.running_mean"] ** 2 for s in states) / 2
    torch.testing.assert_close(pooled["bn.running_mean"], mean)
    torch.testing.assert_close(pooled["bn.running_var"], second - mean**2)
    kept = merge_state_dicts(experts, base, "task_arithmetic", buffers="base")
    for key in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(kept[key], base.state_dict()[key])
    assert kept["bn.num_batches_tracked"].item() == 1
    with pytest.raises(ValueError, match="buffers='base' needs a base"):
        merge_state_dicts(experts, buffers="base")
    with pytest.raises(ValueError, match="'average'"):
        merge_state_dicts(experts, buffers="average")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"mean", "linear"}))
def test_task_vector_methods_need_a_base(method):
    with pytest.raises(ValueError, match=f"'{method}'.*base") as error:
        merge_state_dicts(models(2), method=method, **kwargs_for(method))
    assert str(error.value).count(". ") == 0
    for scale in (0.5, "norm"):
        with pytest.raises(ValueError, match="needs a base"):
            merge_state_dicts(models(2), scaling_coefficient=scale)


def test_mismatched_heads():
    experts = [*models(1, labels=3), *models(1, seed=1, labels=2)]
    base = models(1, seed=9)[0]
    with pytest.raises(ValueError) as error:
        merge_state_dicts(experts, base)
    message = str(error.value)
    assert "classifier.weight" in message and "(3, 6)" in message and "(2, 6)" in message
    assert "classifier.bias" in message and "fc.weight" not in message and "exclude" in message
    excluded = merge_state_dicts(experts, base, exclude=["classifier.*"])
    with pytest.warns(UserWarning, match="classifier.weight"):
        loose = merge_state_dicts(experts, base, strict=False)
    assert_same(excluded, loose)
    assert torch.equal(excluded["classifier.weight"], base.state_dict()["classifier.weight"])
    free = merge_state_dicts(experts, exclude=["classifier.*"])
    assert torch.equal(free["classifier.weight"], experts[0].state_dict()["classifier.weight"])


def test_missing_keys():
    left, right = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "c": torch.ones(2)}
    with pytest.raises(ValueError, match="'b .missing in 1 of 2.*'c .missing"):
        merge_state_dicts([left, right])
    with pytest.warns(UserWarning, match="copied from.*'b'.*left out: 'c'"):
        merged = merge_state_dicts([left, right], strict=False)
    assert_same(merged, {"a": torch.full((2,), 0.5), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_state_dicts([left, right], exclude=["*"])
    with pytest.raises(ValueError, match="list of name patterns"):
        merge_state_dicts([left, right], exclude="b")


def test_non_finite_and_complex_tensors_are_named():
    good = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="'b' of 'second'"):
        merge_state_dicts([good, {**good, "b": torch.tensor([1.0, float("nan")])}], names=["first", "second"])
    with pytest.raises(ValueError, match="'a' of 'base'"):
        merge_state_dicts([good], {**good, "a": torch.tensor([float("inf"), 0.0])})
    with pytest.raises(ValueError, match="complex"):
        merge_state_dicts([{"a": torch.ones(2, dtype=torch.complex64)}])
    # Masks of minus infinity in excluded tensors are none of our business.
    bad = {**good, "b": torch.tensor([0.0, float("-inf")])}
    assert merge_state_dicts([bad, bad], exclude=["b"])["b"][1] == float("-inf")


def test_integers_never_see_arithmetic():
    large = 2**53 + 1
    states = [{"w": torch.ones(2), "ids": torch.tensor([large]), "flag": torch.tensor([True])} for _ in range(2)]
    base = {"w": torch.zeros(2), "ids": torch.tensor([large + 1]), "flag": torch.tensor([False])}
    merged = merge_state_dicts(states, base, weights=[0.3, 0.1])
    assert merged["ids"].item() == large + 1 and merged["flag"].item() is False
    assert merge_state_dicts(states)["ids"].item() == large


def test_min_sparse_numel_reaches_the_methods_that_use_it():
    experts, base = random_vectors(2, {"w": (9, 11)}, seed=1), random_vectors(1, {"w": (9, 11)}, seed=2)[0]
    mean = merge_state_dicts(experts, base)["w"]
    for method in ("ties", "dare", "dare_ties", "breadcrumbs"):
        torch.testing.assert_close(merge_state_dicts(experts, base, method, density=0.2)["w"], mean)
        masked = merge_state_dicts(experts, base, method, density=0.2, min_sparse_numel=0)["w"]
        assert not torch.allclose(masked, mean)
    assert torch.equal(merge_state_dicts(experts, base, min_sparse_numel=5)["w"], mean)


def test_keywords_are_checked_before_the_models_are_read():
    with pytest.raises(ValueError, match="density"):
        merge_state_dicts([None], None, "ties", density=3)
    with pytest.raises(KeyError, match="known methods"):
        merge_state_dicts([None], None, "nope")
    with pytest.raises(ValueError, match="'exclde'"):
        merge_state_dicts([None], exclde=["a"])
    with pytest.raises(ValueError, match="empty"):
        merge_state_dicts([])


def test_a_method_that_returns_its_input_cannot_leak_it(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @register_merge_method("first", family="elementwise", requires_base=False)
    def first(task_vectors, weights, names):
        return dict(task_vectors[0])

    state = {"w": torch.ones(3)}
    merge_state_dicts([state], method="first")["w"].zero_()
    assert state["w"].tolist() == [1.0] * 3


def test_inputs_are_unchanged_and_extra_state_is_kept():
    states = [OrderedDict(w=torch.ones(3) * i, _extra_state={"version": 1}) for i in range(2)]
    merged = merge_state_dicts(states)
    assert merged["_extra_state"] == {"version": 1} and merged["w"].tolist() == [0.5] * 3
    assert states[1]["w"].tolist() == [1.0] * 3 and list(states[0]) == ["w", "_extra_state"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "mean", "karcher"])
def test_post_processors_follow_the_method_and_precede_the_scale(method):
    experts, base = random_vectors(3, seed=1), random_vectors(1, seed=2)[0]
    names, specs = ["a", "b", "c"], ["svc", {"lines": {"alpha": 0.5, "beta": 0.25}}]
    vectors = [{key: e[key].double() - base[key].double() for key in base} for e in experts]
    if method == "karcher":
        absolute = merge_state_dicts(experts, base, method, names=names)
        merged = {key: absolute[key].double() - base[key].double() for key in base}
    else:
        merged = merge_task_vectors(vectors, method, names=names)
    context = prepare_post_processors(specs, sorted(base), vectors, [1.0] * 3, names, method)
    expected = apply_post_processors(specs, merged, vectors, [1.0] * 3, names, context)
    result = merge_state_dicts(experts, base, method, names=names, scaling_coefficient=0.4, postprocess=specs)
    for key in base:
        torch.testing.assert_close(result[key].double(), base[key].double() + 0.4 * expected[key], rtol=0, atol=1e-6)
    assert not torch.allclose(expected["layer.weight"], merged["layer.weight"].double())


def test_wrong_post_processors_end_before_the_models_are_read():
    with pytest.raises(KeyError, match="'svd'.*svc"):
        merge_state_dicts([None], postprocess=["svd"])
    with pytest.raises(ValueError, match=r"write \['svc'\]"):
        merge_state_dicts([None], postprocess="svc")
    with pytest.raises(ValueError, match="postprocess.*base"):
        merge_state_dicts(random_vectors(2), postprocess=["svc"])


def test_sequential_methods_follow_the_order_of_the_models():
    experts, base = random_vectors(3, seed=1), random_vectors(1, seed=2)[0]
    vectors = [{key: e[key].double() - base[key].double() for key in base} for e in experts]
    merged = merge_state_dicts(experts, base, "opcm", names=["c", "a", "b"])
    vector = merge_task_vectors(vectors, "opcm", names=["c", "a", "b"])
    for key in base:
        torch.testing.assert_close(merged[key].double(), base[key].double() + vector[key], rtol=0, atol=1e-6)
    norms = [sum(float(t.square().sum()) for t in v.values()) ** 0.5 for v in (*vectors, vector)]
    assert norms[-1] == pytest.approx(sum(norms[:-1]) / 3, rel=1e-6)
    other = merge_state_dicts(experts[::-1], base, "opcm", names=["b", "a", "c"])
    assert not torch.allclose(other["layer.weight"], merged["layer.weight"])


def test_what_is_no_list_of_models_and_no_type_of_weights():
    model = torch.nn.Linear(2, 2)
    for single in (model, model.state_dict()):
        with pytest.raises(ValueError, match="state_dicts is one model; give a list"):
            merge_state_dicts(single)
    for dtype in (torch.int8, torch.bool, torch.complex64, "bfloat16"):
        with pytest.raises(ValueError, match="no type for weights"):
            merge_state_dicts([model, model], dtype=dtype)


def test_copied_tensors_do_not_overflow_silently():
    state = {"a.weight": torch.ones(2, 2), "keep": torch.tensor([1e6])}
    with pytest.raises(ValueError, match="'keep' overflows torch.float16"):
        merge_state_dicts([state, state], exclude=["keep"], dtype=torch.float16)
    endless = {**state, "keep": torch.tensor([float("inf")])}
    assert torch.isinf(merge_state_dicts([endless, endless], exclude=["keep"], dtype=torch.float16)["keep"]).all()


def test_shapes_without_rows_are_no_vocabulary():
    scalar, row = {"embed_scale": torch.tensor(1.0)}, {"embed_scale": torch.ones(1)}
    with pytest.raises(ValueError, match="embed_scale"):
        merge_state_dicts([scalar, row])


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_matrices_without_entries_are_left_alone(method):
    state = {"a.weight": torch.ones(2, 3), "none.weight": torch.ones(0, 8)}
    merged = merge_state_dicts([state, state], {key: 0 * tensor for key, tensor in state.items()}, method=method)
    assert merged["none.weight"].shape == (0, 8)


def test_rows_that_a_shorter_base_does_not_have_are_named():
    model = {"embed.weight": torch.ones(42, 3), "w": torch.ones(2)}
    base = {"embed.weight": torch.zeros(40, 3), "w": torch.zeros(2)}
    with pytest.warns(UserWarning, match="fewer rows than others in 'embed.weight'.*left out"):
        merged = merge_state_dicts([model, model], base, vocab_policy="common")
    assert merged["embed.weight"].shape == (40, 3)
