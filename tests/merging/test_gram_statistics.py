from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_atm.merging import collect_gram, merge_state_dicts


def tiny_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=3, **sizes))


def padded(lengths, seed=0):
    """One example per length, padded on the right to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, 20, mask.shape, generator=generator) * mask, "attention_mask": mask}


def collect(model, batches, num_examples=None, **kwargs):
    return collect_gram(model, batches, num_examples, disable_tqdm=True, **kwargs)


def near(left, right):
    torch.testing.assert_close(left, right.to(left.dtype), rtol=1e-5, atol=1e-6)


def test_inputs_of_every_layer_are_seen():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)), torch.randn(10, 5)
    found = collect(model, data.split(3))
    hidden = torch.tanh(model[0](data)).detach()
    assert sorted(found) == ["0.weight", "2.weight"]
    near(found["0.weight"], data.T.double() @ data.double() / 10)
    near(found["2.weight"], hidden.T.double() @ hidden.double() / 10)
    assert found["0.weight"].dtype == torch.float32 and found["0.weight"].is_contiguous()


def test_number_of_examples_is_exact_whatever_the_batches():
    torch.manual_seed(0)
    layer, data = nn.Linear(5, 2), torch.randn(30, 5)
    expected = data[:7].T @ data[:7] / 7
    for size in (1, 3, 7, 30):
        near(collect(layer, data.split(size), 7)["weight"], expected)
    labels = torch.zeros(30)
    near(collect(layer, [(data[:20], labels[:20]), (data[20:], labels[20:])], 7)["weight"], expected)
    seen = []

    def stream():
        for part in data.split(7):
            seen.append(len(part))
            yield part

    collect(layer, stream(), 7)
    assert seen == [7]


def test_padding_does_not_count():
    model = tiny_bert()
    together = padded([6, 3])
    alone = [{key: value[i : i + 1, :length] for key, value in together.items()} for i, length in ((0, 6), (1, 3))]
    left, right = collect(model, [together]), collect(model, alone)
    assert len(left) == 6 + 2 and sorted(left) == sorted(right)
    for key in left:
        near(left[key], right[key])
    # The pooled token and the classifier have one row per sequence, which no mask concerns.
    assert left["classifier.weight"].shape == (8, 8) and bool(left["classifier.weight"].any())
    unmasked = collect(model, [{"input_ids": together["input_ids"]}])
    key = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.allclose(unmasked[key], left[key], atol=1e-2)


def test_conv1d_layers_of_gpt2_and_tied_heads():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=16, n_inner=12)
    models = [GPT2LMHeadModel(config) for _ in range(2)]
    batch = padded([5, 4])
    statistics = [collect(model, [batch]) for model in models]
    sides = {key: len(value) for key, value in statistics[0].items()}
    stem = "transformer.h.0"
    assert sides == {
        f"{stem}.attn.c_attn.weight": 8,
        f"{stem}.attn.c_proj.weight": 8,
        f"{stem}.mlp.c_fc.weight": 8,
        f"{stem}.mlp.c_proj.weight": 12,
    }
    with_head = collect(models[0], [batch], exclude=[])
    assert sorted(set(with_head) - set(sides)) == ["lm_head.weight"]
    # One weight under two names has one matrix under two names.
    head = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    head["b"].weight = head["a"].weight
    both = nn.Sequential(head["a"], head["b"])
    found = collect(both, [torch.randn(4, 3)])
    assert torch.equal(found["0.weight"], found["1.weight"])
    assert found["0.weight"].data_ptr() != found["1.weight"].data_ptr()

    merged = merge_state_dicts(models, method="regmean", statistics=statistics, a=1.0)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj"):
        key = f"{stem}.{name}.weight"
        grams = [statistic[key].double() for statistic in statistics]
        weights = [model.state_dict()[key].double() for model in models]
        # Stored (inputs, outputs), so that the Gram matrices act from the left.
        products = sum(gram @ weight for gram, weight in zip(grams, weights, strict=True))
        residual = sum(grams) @ merged[key].double() - products
        assert float(residual.norm()) < 1e-4 * float(products.norm())


def test_encoder_and_decoder_have_masks_of_their_own():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    source, target = padded([5, 2]), padded([3, 5], seed=1)
    batch = {
        **source,
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": target["attention_mask"],
    }
    parts = []
    for i, (m, n) in enumerate([(5, 3), (2, 5)]):
        parts.append({k: v[i : i + 1, : n if k.startswith("decoder") else m] for k, v in batch.items()})
    left, right = collect(model, [batch]), collect(model, parts)
    assert "decoder.block.0.layer.1.EncDecAttention.k.weight" in left
    for key in left:
        near(left[key], right[key])


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_convolutions_are_linear_in_their_patches(options):
    torch.manual_seed(0)
    conv, images = nn.Conv2d(2, 3, 3, bias=False, **options).double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    gram = collect(conv, [images])["weight"]
    outputs = conv(images).transpose(0, 1).flatten(1)
    weight = conv.weight.flatten(1)
    torch.testing.assert_close(weight @ gram @ weight.T, outputs @ outputs.T / 4)
    grouped = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(32, 2))
    assert list(collect(grouped, [images.float()])) == ["2.weight"]


def test_half_precision_is_accumulated_in_float32():
    layer, data = nn.Linear(3, 2).bfloat16(), torch.full((300, 3), 1.0).bfloat16()
    # Sums of ones stall at 256 in bfloat16.
    assert collect(layer, [data] * 2)["weight"][0, 1].item() == 1.0
    assert collect(layer.double(), [data.double()])["weight"].dtype == torch.float64


def test_model_is_left_as_it_was():
    model = tiny_bert().train()
    model.dropout.eval()
    modes = [module.training for module in model.modules()]
    first = collect(model, [padded([4, 2])])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(first[key], value) for key, value in collect(model, [padded([4, 2])]).items())
    with pytest.raises(IndexError):
        collect(model, [{"input_ids": torch.tensor([[999]])}])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_further_inputs_reach_the_model():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})

        def forward(self, x, task):
            return self.heads[task](x)

    assert list(collect(Heads(), [torch.ones(2, 3)], inputs={"task": "b"})) == ["heads.b.weight"]


def test_bad_input():
    with pytest.raises(ValueError, match="no batch"):
        collect(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="No linear layer outside exclude"):
        collect(nn.Linear(2, 2), [torch.ones(1, 2)], exclude=["*"])
    with pytest.raises(ValueError, match="No linear layer"):
        collect(nn.Tanh(), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="num_examples=0"):
        collect(nn.Linear(2, 2), [torch.ones(1, 2)], 0)
    with pytest.raises(ValueError, match="holds no tensors"):
        collect(nn.Linear(2, 2), [{"text": "hello"}])
