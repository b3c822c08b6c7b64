"""Prototypes, heads, conditioning and latent MixUp against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.fewshot import (
    MatchingHead,
    PrototypicalHead,
    TaskConditioning,
    class_means,
    latent_mixup_loss,
    mixup_masks,
)

from . import reference


N, K, Q, D = 4, 5, 3, 12


@pytest.fixture
def episode():
    generator = np.random.default_rng(0)
    support, query = generator.normal(size=(N * K, D)), generator.normal(size=(N * Q, D))
    labels = generator.permutation(np.repeat(np.arange(N), K))
    return support, query, labels


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def test_prototypes_are_means(episode):
    support, _, labels = episode
    means = class_means(*tensors(support, labels))
    assert np.allclose(means.numpy(), reference.class_means(support, labels), rtol=1e-12)
    assert class_means(torch.ones(4, 2).bfloat16(), torch.tensor([0, 0, 1, 1])).dtype == torch.float32


@pytest.mark.parametrize("distance", ["sqeuclidean", "cosine"])
def test_logits_equal_the_reference(episode, distance):
    support, query, labels = episode
    head = PrototypicalHead(scale=2.5, distance=distance).double()
    logits = head(*tensors(query, support, labels)).detach().numpy()
    oracle = {"sqeuclidean": reference.squared_logits, "cosine": reference.cosine_logits}[distance]
    assert np.allclose(logits, oracle(query, reference.class_means(support, labels), 2.5), rtol=1e-10)


def test_matching_equals_the_reference(episode):
    support, query, labels = episode
    head = MatchingHead(scale=3.0).double()
    logits = head(*tensors(query, support, labels)).detach()
    assert np.allclose(logits.exp().numpy(), reference.matching_probabilities(query, support, labels, 3.0), rtol=1e-10)
    assert torch.allclose(logits.exp().sum(-1), torch.ones(len(query)).double())


@pytest.mark.parametrize("head", [PrototypicalHead(2.0), PrototypicalHead(2.0, "cosine"), MatchingHead(2.0)])
def test_many_episodes_at_once_are_each_alone(head):
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(6, N * n, D, generator=generator) for n in (K, Q))
    labels = torch.stack([torch.randperm(N * K, generator=generator) % N for _ in range(6)])
    together = head(query, support, labels)
    alone = torch.stack([head(q, s, y) for q, s, y in zip(query, support, labels, strict=True)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    shared = head(query, support, labels[0])
    assert torch.allclose(shared[0], alone[0], rtol=1e-5, atol=1e-5)


def test_rotation_and_translation_change_nothing_and_class_order_permutes(episode):
    support, query, labels = episode
    head = PrototypicalHead(1.5).double()
    before = head(*tensors(query, support, labels))
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))
    move = 3 * np.random.default_rng(2).normal(size=D)
    assert torch.allclose(head(*tensors(query @ rotation + move, support @ rotation + move, labels)), before)
    order = np.array([2, 0, 3, 1])
    assert torch.allclose(head(*tensors(query, support, order[labels]))[:, order], before)


def test_the_auto_scale_makes_the_mean_logit_minus_ten(episode):
    support, query, labels = episode
    head = PrototypicalHead("auto").double()
    assert not head.calibrated
    logits = head(*tensors(query, support, labels))
    assert logits.mean().item() == pytest.approx(-10, rel=1e-9)
    scale = head.scale.item()
    head(*tensors(5 * query, support, labels))
    assert head.scale.item() == scale, "the first episode alone decides"
    other = PrototypicalHead("auto").double()
    other.load_state_dict(head.state_dict())
    assert other.calibrated and other.scale.item() == scale
    batch = torch.randn(3, N * Q, D).double(), torch.randn(3, N * K, D).double()
    first, many = PrototypicalHead("auto").double(), PrototypicalHead("auto").double()
    first(batch[0][:1], batch[1][:1], torch.from_numpy(labels))
    many(*batch, torch.from_numpy(labels))
    assert first.scale.item() == many.scale.item()


def test_the_scale_learns(episode):
    head = PrototypicalHead("auto")
    head(*[t.float() if t.is_floating_point() else t for t in tensors(*episode[1::-1], episode[2])]).sum().backward()
    assert head.scale.grad is not None and head.scale.grad != 0


def test_conditioning_equals_the_reference():
    torch.manual_seed(0)
    module = TaskConditioning(3, D, gamma_init=0.7, beta_init=-0.4).double()
    prototypes = torch.randn(5, N, D).double()
    gammas, betas = module(prototypes)
    assert gammas.shape == betas.shape == (5, 3, D)
    weights = {}
    for name in ("gamma", "beta"):
        network = getattr(module, name)
        chain = [layer for layer in network.chain if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in chain] == [D // 2, D // 2, 3 * D]
        weights[name] = (
            network.skip.weight.detach().numpy(),
            [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in chain],
        )
    for index in range(5):
        gamma, beta = reference.film(prototypes[index].numpy(), weights, np.full(3, 0.7), np.full(3, -0.4), 3)
        assert np.allclose(gammas[index].detach().numpy(), gamma) and np.allclose(betas[index].detach().numpy(), beta)


def test_conditioning_of_nothing_is_the_identity():
    gammas, betas = TaskConditioning(2, D, gamma_init=0.0, beta_init=0.0)(torch.randn(N, D))
    assert (gammas == 1).all() and (betas == 0).all()
    penalty = TaskConditioning(2, D, gamma_init=0.0, beta_init=0.0).penalty()
    penalty.backward()
    assert penalty.item() == 0, "and its penalty has a gradient, not NaN"
    module = TaskConditioning(4, D, gamma_init=2.0, beta_init=1.0)
    module.penalty().backward()
    assert module.penalty().item() == pytest.approx(4 + 2)
    assert torch.isfinite(module.gamma_scale.grad).all()


@pytest.mark.parametrize("kind", ["blocks", "exact"])
def test_mixup_equals_the_reference(episode, kind):
    support, query, labels = episode
    prototypes = reference.class_means(support, labels)
    # One query per class: which embedding stands for a class is then not left to chance.
    loss = latent_mixup_loss(
        *tensors(query[:N], np.arange(N), prototypes), 1.5, mask=kind, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    torch.rand(6, N, generator=generator)  # the choice of embeddings, one number per pair and query
    alpha = torch.rand(6, generator=generator)
    masks = mixup_masks(alpha, D, kind, generator)
    pairs = [(a, b) for a in range(N) for b in range(a + 1, N)]
    wanted = sum(
        reference.mixup_pair(query[a], query[b], mask.numpy(), float(share), prototypes, 1.5)
        for (a, b), mask, share in zip(pairs, masks, alpha, strict=True)
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


def test_a_full_mask_gives_the_first_class_back(episode):
    support, query, labels = episode
    assert mixup_masks(torch.ones(7), D, "exact").all()
    prototypes = reference.class_means(support, labels)
    assert reference.mixup_pair(query[0], query[1], np.ones(D), 1.0, prototypes, 1.0) == pytest.approx(0)
    loss = latent_mixup_loss(*tensors(query[:N], np.arange(N), prototypes), 1.0, mask="exact", alpha=1.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_masks_cover_what_they_should():
    alpha = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    exact = mixup_masks(alpha, 64, "exact", torch.Generator().manual_seed(1))
    assert torch.equal(exact.sum(-1), (alpha * 64).round().long())
    blocks = mixup_masks(alpha, 64, "blocks", torch.Generator().manual_seed(1)).float()
    # Drawing with replacement covers less than asked for.
    assert (blocks.mean(-1) <= alpha + 1e-6).all()
    covered = blocks.mean(-1)[alpha > 0.9].mean().item()
    assert 0.45 < covered < 0.65
    per_dimension = exact.float().mean(0)
    assert (per_dimension - 0.5).abs().max() < 0.05


def test_blocks_are_whole(episode):
    masks = mixup_masks(torch.full((500,), 0.5), 25, "blocks", torch.Generator().manual_seed(0)).int()
    sizes = {25 // m for m in range(10, 25)}
    for mask in masks.tolist():
        runs = "".join(map(str, mask)).split("0")
        assert all(any(len(run) % size == 0 for size in sizes) for run in runs if run)
    # From 13 blocks on they are single dimensions and the last ones stay out.
    assert masks.float().mean(0)[-1] < masks.float().mean(0)[0]


def test_mixup_is_the_mean_over_episodes():
    torch.manual_seed(0)
    query, prototypes = torch.randn(5, N, D), torch.randn(5, N, D)
    whole = latent_mixup_loss(
        query, torch.arange(N), prototypes, 1.0, mask="exact", generator=torch.Generator().manual_seed(0), alpha=1.0
    )
    assert whole.item() == pytest.approx(0, abs=1e-6)
    flat = latent_mixup_loss(query, torch.arange(N), prototypes, torch.tensor(1.0, requires_grad=True))
    assert flat.shape == () and flat.requires_grad and flat > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrototypicalHead(scale=0), "scale is 0"),
        (lambda: PrototypicalHead(scale="big"), "scale is 'big'"),
        (lambda: PrototypicalHead(distance="l1"), "distance is 'l1'; known: cosine, sqeuclidean"),
        (lambda: PrototypicalHead()(torch.ones(1, 3), torch.ones(2, 4), torch.tensor([0, 1])), "3 and 4 dimensions"),
        (lambda: class_means(torch.ones(2, 3), torch.tensor([0, 2])), "class 1 has no support"),
        (lambda: class_means(torch.ones(2, 3), torch.tensor([0, 1, 1])), "2 support samples and 3 labels"),
        (lambda: mixup_masks(torch.ones(1), 10, "blocks"), "more than 10 dimensions, and the embeddings have 10"),
        (lambda: mixup_masks(torch.ones(1), 20, "rows"), "mask is 'rows'; known: blocks, exact"),
        (lambda: TaskConditioning(0, 4), "num_layers is 0"),
        (
            lambda: latent_mixup_loss(torch.ones(2, 12), torch.tensor([0, 0]), torch.ones(2, 12), 1.0),
            "class 1 has no query",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
