from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from hf_atm import MultiTaskModel
from hf_atm.latent import extract_embeddings


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LENGTHS = [5, 3, 4, 1, 5, 2, 3]


@pytest.fixture
def bert():
    return BertModel(BertConfig(vocab_size=12, **SMALL))


def batches(left=False, size=3, **columns):
    """Sentences of several lengths, padded with token 0."""
    tokens = [torch.arange(1, 1 + length) for length in LENGTHS]
    rows = []
    for number, row in enumerate(tokens):
        pad = torch.zeros(5 - len(row), dtype=torch.int64)
        real = torch.ones(len(row), dtype=torch.int64)
        parts = (pad, row) if left else (row, pad)
        mask = (pad, real) if left else (real, pad)
        rows.append(
            {"input_ids": torch.cat(parts), "attention_mask": torch.cat(mask)}
            | {name: values[number] for name, values in columns.items()}
        )
    return DataLoader(rows, batch_size=size)


def hidden(model, number, **kwargs):
    """One sentence alone, without padding."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 1 + LENGTHS[number])[None], **kwargs)


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls", "last", "pooler"])
def test_text_is_pooled_over_real_tokens(bert, pooling):
    found = extract_embeddings(bert, batches(labels=[0, 1, 2, 0, 1, 2, 0]), pooling, task="t").embeddings
    for number, row in enumerate(found):
        outputs = hidden(bert, number)
        states = outputs.last_hidden_state[0]
        expected = {"cls": states[0], "last": states[-1], "pooler": outputs.pooler_output[0]}
        torch.testing.assert_close(row, expected.get(pooling, states.mean(0)), rtol=0, atol=1e-5)


def test_ids_labels_and_the_name(bert):
    space = extract_embeddings(bert, batches(labels=[0, 1, 2, 0, 1, 2, 0]), task="t")
    assert (
        space.task == "t" and space.ids.tolist() == list(range(7)) and space.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    )
    named = extract_embeddings(bert, batches(id=[f"x{n}" for n in range(7)], label=[0.5] * 7, task=["t"] * 7))
    assert named.ids.tolist() == [f"x{n}" for n in range(7)] and named.labels is None
    torch.testing.assert_close(named.embeddings, space.embeddings)
    numbered = extract_embeddings(bert, batches(idx=[70, 60, 50, 40, 30, 20, 10], unknown=torch.ones(7)))
    assert numbered.ids.tolist() == [70, 60, 50, 40, 30, 20, 10]


def test_layers(bert):
    found = extract_embeddings(bert, batches(), "cls", layer=1).embeddings
    for number, row in enumerate(found):
        states = hidden(bert, number, output_hidden_states=True).hidden_states
        torch.testing.assert_close(row, states[1][0, 0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="layer=7, but there are 3 hidden states"):
        extract_embeddings(bert, batches(), "cls", layer=7)
    with pytest.raises(ValueError, match="pooling='pooler' belongs to the last layer"):
        extract_embeddings(bert, batches(), "pooler", layer=1)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_decoders_give_their_last_real_token(left):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    found = extract_embeddings(model, batches(left)).embeddings
    for number, row in enumerate(found):
        torch.testing.assert_close(row, hidden(model.transformer, number).last_hidden_state[0, -1], rtol=0, atol=1e-5)


def test_encoder_decoders_give_their_encoder():
    model = T5Model(T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    found = extract_embeddings(model, batches()).embeddings
    expected = hidden(model.encoder, 1).last_hidden_state[0].mean(0)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)


def test_heads_adapters_and_multi_task_models_give_their_backbone():
    classifier = BertForSequenceClassification(BertConfig(vocab_size=12, **SMALL))
    expected = extract_embeddings(classifier.bert, batches()).embeddings
    torch.testing.assert_close(extract_embeddings(classifier, batches()).embeddings, expected)
    multi = MultiTaskModel.from_backbone(classifier, tasks={"x": {"num_labels": 2}, "y": {"num_labels": 3}})
    torch.testing.assert_close(extract_embeddings(multi, batches()).embeddings, expected)
    adapted = get_peft_model(multi, LoraConfig(target_modules=["query"], r=2))
    torch.testing.assert_close(extract_embeddings(adapted, batches()).embeddings, expected)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    assert not torch.allclose(extract_embeddings(adapted, batches()).embeddings, expected, atol=1e-3)


def images():
    return DataLoader([{"pixel_values": torch.randn(3, 8, 8)} for _ in range(5)], batch_size=2)


def test_images_give_what_the_model_pools_or_projects():
    shape = {"image_size": 8, "patch_size": 4}
    vit = ViTModel(ViTConfig(**SMALL, **shape), add_pooling_layer=False)
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, **shape, projection_dim=6))
    convnext = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=8))
    data = images()
    pixels = torch.stack([row["pixel_values"] for row in data.dataset])
    with torch.no_grad():
        expected = {
            vit: vit.eval()(pixels).last_hidden_state.mean(1),
            clip: clip.eval()(pixels).image_embeds,
            convnext: convnext.eval()(pixels).pooler_output,
        }
        places = convnext(pixels).last_hidden_state.flatten(2).mean(-1)
    for model, rows in expected.items():
        torch.testing.assert_close(extract_embeddings(model, data).embeddings, rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(extract_embeddings(convnext, data, "mean").embeddings, places, rtol=0, atol=1e-5)
    torch.testing.assert_close(extract_embeddings(vit, data, "cls").embeddings.shape, torch.Size((5, 16)))


def test_modules_callables_and_pooling_functions():
    x, labels, ids = torch.randn(7, 4), torch.arange(7) % 3, torch.arange(7) + 100
    data = DataLoader(TensorDataset(x, labels, ids), batch_size=3)
    module = nn.Linear(4, 2)
    space = extract_embeddings(module, data)
    torch.testing.assert_close(space.embeddings, module(x).detach())
    assert space.ids.tolist() == ids.tolist() and space.labels.tolist() == labels.tolist()
    torch.testing.assert_close(extract_embeddings(lambda batch: batch[0] * 2, data).embeddings, 2 * x)
    pooled = extract_embeddings(module, data, pooling=lambda outputs, batch: outputs + batch[0][:, :2])
    torch.testing.assert_close(pooled.embeddings, module(x).detach() + x[:, :2])
    bare = extract_embeddings(module, DataLoader(x, batch_size=3))
    assert bare.labels is None and bare.ids.tolist() == list(range(7))


def test_the_model_is_left_as_it_was(bert):
    bert.config.hidden_dropout_prob = 0.5
    model = BertModel(bert.config).train()
    model.encoder.layer[0].eval()
    before = {name: (module.training) for name, module in model.named_modules()}
    first = extract_embeddings(model, batches())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(extract_embeddings(model, batches()).embeddings, first.embeddings)
    assert not first.embeddings.requires_grad

    def fail(outputs, batch):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        extract_embeddings(model, batches(), fail)
    assert model.training


def test_another_device_is_for_the_time_being():
    class Traveller(nn.Linear):
        moves: list[str] = []

        def to(self, place):
            self.moves.append(str(place))

        def forward(self, x):
            self.moves.append(f"batch on {x.device}")
            return torch.ones(len(x), 2)

    extract_embeddings(Traveller(4, 2), [torch.ones(3, 4)], device="meta")
    assert Traveller.moves == ["meta", "batch on meta", "cpu"]


def test_bad_input_is_one_sentence(bert):
    with pytest.raises(KeyError, match="Unknown pooling 'max'; known ones are auto, cls, mean, pooler, last"):
        extract_embeddings(bert, batches(), "max")
    with pytest.raises(ValueError, match="A str cannot be called"):
        extract_embeddings("bert", batches())
    with pytest.raises(
        ValueError, match="The data loader does not read its data in order and its batches carry no ids"
    ):
        extract_embeddings(bert, DataLoader(batches().dataset, batch_size=3, shuffle=True))
    shuffled = BatchSampler(RandomSampler(batches().dataset), 3, drop_last=False)
    for options in ({"sampler": SubsetRandomSampler([0, 2])}, {"batch_sampler": shuffled}):
        with pytest.raises(ValueError, match="does not read its data in order"):
            extract_embeddings(bert, DataLoader(batches().dataset, **options))
    prompted = get_peft_model(bert, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="The adapter learned a prompt"):
        extract_embeddings(prompted, batches())
    with pytest.raises(ValueError, match="The data loader drops its last rows"):
        extract_embeddings(bert, DataLoader(batches().dataset, batch_size=3, drop_last=True))
    with pytest.raises(ValueError, match="The data of 'model' hold no batch"):
        extract_embeddings(bert, [])
    with pytest.raises(ValueError, match="A BertModel takes input_ids, and a batch holds pixel_values"):
        extract_embeddings(bert, images())
    data = [torch.ones(2, 3), torch.ones(2, 3)]
    with pytest.raises(ValueError, match=r"gave \(2,\), not embeddings \(batch, width\)"):
        extract_embeddings(lambda batch: batch[:, 0], data)
    with pytest.raises(ValueError, match="gave embeddings 3 wide and then 2 wide; a space has one width"):
        extract_embeddings(lambda batch: batch, [data[0], data[1][:, :2]])
    with pytest.raises(ValueError, match="has embeddings that are not finite, at the ids 2, 3"):
        extract_embeddings(lambda batch: batch, [data[0], data[1] / 0])
    with pytest.raises(ValueError, match="Some batches of 'model' carry ids and others do not"):
        extract_embeddings(nn.Identity(), [(data[0], None, [0, 1]), (data[1],)])
    with pytest.raises(ValueError, match="holds the ids 1 more than once"):
        extract_embeddings(nn.Identity(), [(data[0], None, [1, 1])])
    with pytest.raises(ValueError, match="pooling='cls' is for transformers models"):
        extract_embeddings(nn.Identity(), data, "cls")
