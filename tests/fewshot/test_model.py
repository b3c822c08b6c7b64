"""The model: one pass for many episodes equals each alone, conditioning, saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, ViTConfig, ViTModel

from hf_atm.fewshot import EpisodeCollator, EpisodeSampler, FewShotModel, PooledEncoder, labels_of

from . import reference
from .conftest import TinyEncoder, Vectors, collate


N, K, Q = 3, 2, 4


@pytest.fixture
def batch():
    data = Vectors()
    sampler = EpisodeSampler(labels_of(data), N, K, Q, num_episodes=5)
    episodes = list(sampler)
    inputs = EpisodeCollator(collate, data)(episodes)
    return data, episodes, inputs


def run(model, inputs):
    return model(inputs["items"], inputs["index"], inputs["k_shot"])


def test_logits_and_loss_equal_the_reference(batch):
    data, episodes, inputs = batch
    model = FewShotModel.from_encoder(TinyEncoder(), scale=0.5).double().eval()
    inputs["items"]["x"] = inputs["items"]["x"].double()
    output = run(model, inputs)
    x = torch.stack([row["x"] for row in data]).double()
    embeddings = model.encoder({"x": x}).detach().numpy()
    losses = []
    for episode, logits in zip(episodes, output.logits.detach().numpy(), strict=True):
        prototypes = embeddings[episode.support].mean(1)
        wanted = reference.squared_logits(embeddings[episode.query].reshape(N * Q, -1), prototypes, 0.5)
        assert np.allclose(logits, wanted)
        for place, row in enumerate(wanted):
            losses.append(-np.log(reference.softmax(row)[place // Q]))
    assert output.loss.item() == pytest.approx(np.mean(losses))
    assert output.labels.tolist() == np.repeat(np.arange(N), Q).tolist()


def conditioned(gamma=0.0, beta=1.0, dropout=0.0):
    torch.manual_seed(0)
    return FewShotModel.from_encoder(
        TinyEncoder(dropout=dropout), conditioning=True, gamma_init=gamma, beta_init=beta, scale=0.5
    )


def test_conditioning_by_nothing_equals_the_plain_pass(batch):
    _, _, inputs = batch
    model = conditioned(0.0, 0.0).eval()
    plain = FewShotModel.from_encoder(model.encoder, scale=0.5).eval()
    assert torch.allclose(run(model, inputs).logits, run(plain, inputs).logits, atol=1e-5)


def test_conditioning_is_that_of_the_own_episode(batch):
    _, episodes, inputs = batch
    data = batch[0]
    model = conditioned(0.6, 0.8).eval()
    together = run(model, inputs)
    for place, episode in enumerate(episodes):
        support = torch.stack([data[row]["x"] for row in episode.support.ravel()])
        query = torch.stack([data[row]["x"] for row in episode.query.ravel()])
        first = model.encoder({"x": support}).view(N, K, -1).mean(1)
        film = tuple(part.unsqueeze(0) for part in model.conditioning(first))
        support, query = (model.encoder({"x": x}, film, torch.zeros(len(x)).long()) for x in (support, query))
        wanted = model.head(query, support, torch.arange(N).repeat_interleave(K))
        assert torch.allclose(together.logits[place], wanted, atol=1e-4)
    assert not torch.allclose(together.logits, run(conditioned(0.0, 0.0).eval(), inputs).logits, atol=1e-2)


def test_gradients_flow_through_both_passes(batch):
    model = conditioned(0.5, 1.0)
    run(model, batch[2]).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    frozen = conditioned(0.5, 1.0)
    film = frozen._film
    frozen._film = lambda *args: tuple(part.detach() for part in film(*args))
    run(frozen, batch[2]).loss.backward()
    assert not torch.allclose(model.encoder.first.weight.grad, frozen.encoder.first.weight.grad)


def test_a_sample_in_two_episodes_counts_twice(batch):
    data, episodes, _ = batch
    model = FewShotModel.from_encoder(TinyEncoder(), scale=0.5)
    inputs = EpisodeCollator(collate, data)([episodes[0], episodes[0]])
    assert len(inputs["items"]["x"]) == N * (K + Q)
    run(model, inputs).loss.backward()
    twice = model.encoder.first.weight.grad.clone()
    model.zero_grad()
    run(model, EpisodeCollator(collate, data)([episodes[0]])).loss.backward()
    assert torch.allclose(twice, model.encoder.first.weight.grad, atol=1e-6)


def bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )


def texts(rows=12, length=7):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(1, 30, (rows, length), generator=generator) * mask, "attention_mask": mask}


def test_a_text_backbone_is_conditioned_layer_by_layer():
    encoder = PooledEncoder(bert(), "mean").eval()
    assert encoder.num_film_layers == 3 and encoder.embedding_dim == 16
    items = texts()
    plain = encoder(items)
    hidden, mask = encoder.backbone(**items).last_hidden_state, items["attention_mask"].unsqueeze(-1)
    assert torch.allclose(plain, (hidden * mask).sum(1) / mask.sum(1), atol=1e-6)
    ones, zeros = torch.ones(2, 3, 16), torch.zeros(2, 3, 16)
    groups = torch.arange(12) % 2
    assert torch.allclose(encoder(items, (ones, zeros), groups), plain, atol=1e-6)
    # A scale of 0 in the last layer leaves its shift alone; the pooled place scales and shifts it again.
    gammas, betas = ones.clone(), zeros.clone()
    gammas[1, 1], betas[1, 1], gammas[1, 2], betas[1, 2] = 0, 3, 2, 1
    mixed = encoder(items, (gammas, betas), groups)
    assert torch.allclose(mixed[1::2], torch.full_like(mixed[1::2], 7.0))
    assert torch.allclose(mixed[::2], plain[::2], atol=1e-6)
    betas[:, 0] = torch.randn(16)
    assert not torch.allclose(encoder(items, (gammas, betas), groups)[::2], plain[::2], atol=1e-2)
    assert not any(layer._forward_hooks for layer in encoder.backbone.encoder.layer)


def test_a_vision_backbone_works():
    vit = ViTModel(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    model = FewShotModel.from_encoder(vit, pooling="cls", conditioning=True, scale="auto")
    items = {"pixel_values": torch.randn(6, 3, 8, 8)}
    assert model(items, torch.arange(6).view(1, 2, 3), 1).logits.shape == (1, 4, 2)


@pytest.mark.parametrize("conditioning", [False, True])
def test_a_saved_model_loads_with_equal_logits(conditioning, tmp_path):
    model = FewShotModel.from_encoder(bert(), pooling="cls", conditioning=conditioning, scale="auto").eval()
    items, index = texts(), torch.arange(12).view(1, 3, 4)
    before = model(items, index, 2).logits
    model.save_pretrained(tmp_path)
    for loaded in (FewShotModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, FewShotModel)
        assert not loaded.head.pending and loaded.encoder.pooling == "cls"
        assert torch.allclose(loaded.eval()(items, index, 2).logits, before, atol=1e-5)


def test_a_model_of_an_own_encoder_says_how_to_load_it(tmp_path):
    FewShotModel.from_encoder(TinyEncoder()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not describe its encoder"):
        FewShotModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FewShotModel.from_encoder(torch.nn.Linear(2, 2)), "Linear is no encoder of episodes"),
        (lambda: FewShotModel.from_encoder(TinyEncoder(), head="linear"), "head is 'linear'; known: matching, proto"),
        (
            lambda: FewShotModel.from_encoder(TinyEncoder(), head="matching", conditioning=True),
            "conditioning needs prototypes",
        ),
        (
            lambda: FewShotModel.from_encoder(_without_layers(), conditioning=True),
            "TinyEncoder has no layers to scale and shift",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def _without_layers():
    encoder = TinyEncoder()
    encoder.num_film_layers = 0
    return encoder
