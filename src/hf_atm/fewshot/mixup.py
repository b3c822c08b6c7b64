"""Latent MixUp: embeddings mixed from two classes should be classified in proportion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from .heads import prototype_logits


MASKS = ("blocks", "exact")
_FEWEST_BLOCKS = 10

Generators = torch.Generator | Sequence[torch.Generator] | None


def mixup_masks(alpha: torch.Tensor, dim: int, mask: str = "blocks", generator: Generators = None) -> torch.Tensor:
    """Which dimensions of a mixture come from its first embedding.

    Args:
        alpha (`torch.Tensor` of shape `(...)`): Shares in [0, 1].
        dim (`int`): Width of the embeddings.
        mask (`str`, *optional*, defaults to `"blocks"`): `"blocks"` divides the dimensions into 10 to `dim - 1` blocks
            and draws `alpha` of them with replacement, so that less than `alpha` is covered; `"exact"` takes
            `round(alpha * dim)` dimensions.
        generator (`torch.Generator` or list of them, *optional*): A CPU generator, or one for each entry of the first
            axis; torch's own by default.

    Returns:
        `torch.Tensor` of shape `(..., dim)`, bool, on the device of `alpha`.
    """
    check_mask(mask, dim)
    shape, device = alpha.shape, alpha.device
    alpha = alpha.detach().cpu().unsqueeze(-1)
    if mask == "exact":
        order = _drawn(torch.rand, (*shape, dim), generator).argsort(-1)
        return (order < (alpha * dim).round()).to(device)
    blocks = _drawn(partial(torch.randint, _FEWEST_BLOCKS, dim), (*shape, 1), generator)
    drawn = (_drawn(torch.rand, (*shape, dim), generator) * blocks).long().clamp(max=blocks - 1)
    wanted = torch.arange(dim) < (alpha * blocks).floor()
    # A place behind the last block takes what is not wanted.
    chosen = torch.zeros(*shape, dim + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(wanted, drawn, dim), True)
    chosen[..., dim] = False
    block = torch.arange(dim) // (dim // blocks)
    return chosen.gather(-1, torch.where(block < blocks, block, dim)).to(device)


def _drawn(draw: Callable, shape: Sequence[int], generator: Generators) -> torch.Tensor:
    """Random numbers, those of each entry of the first axis from its own generator if there are several."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw(tuple(shape[1:]), generator=own) for own in generator])
    return draw(tuple(shape), generator=generator)


def check_mask(mask: str, dim: int) -> None:
    """Refuses an unknown kind of mask, and blocks for embeddings too narrow for them."""
    if mask not in MASKS:
        raise ValueError(f"mask is {mask!r}; known: {', '.join(MASKS)}.")
    if mask == "blocks" and dim <= _FEWEST_BLOCKS:
        raise ValueError(
            f"block masks need more than {_FEWEST_BLOCKS} dimensions, and the embeddings have {dim}; use mask='exact'."
        )


def latent_mixup_loss(
    query: torch.Tensor,
    labels: torch.Tensor,
    prototypes: torch.Tensor,
    scale: torch.Tensor | float,
    mask: str = "blocks",
    generator: Generators = None,
    distance: str = "sqeuclidean",
    alpha: float | None = None,
) -> torch.Tensor:
    """Latent MixUp, https://huggingface.co/papers/2206.03695.

    For every pair of classes one query embedding each is mixed, `z = m * z_a + (1 - m) * z_b`, and
    `|p(z) - alpha * p(z_a) - (1 - alpha) * p(z_b)|^2` added up, `p` being the probabilities by prototype.

    Args:
        query (`torch.Tensor` of shape `(..., Q, d)`): Embeddings, any number of episodes at once.
        labels (`torch.Tensor` of shape `(Q,)` or `(..., Q)`): Their classes, 0 to N - 1; every class occurs.
        prototypes (`torch.Tensor` of shape `(..., N, d)`): One per class.
        scale (`torch.Tensor` or `float`): Inverse temperature of the head.
        mask (`str`, *optional*, defaults to `"blocks"`): See [`mixup_masks`].
        generator (`torch.Generator` or list of them, *optional*): A CPU generator that decides pairs, shares and
            masks, or one for each episode, so that these do not depend on the others.
        distance (`str`, *optional*, defaults to `"sqeuclidean"`): As in the head.
        alpha (`float`, *optional*): A fixed share; drawn from U(0, 1) by default.

    Returns:
        `torch.Tensor`: a number, the mean over episodes.
    """
    check_mask(mask, query.shape[-1])
    num_classes, device = prototypes.shape[-2], query.device
    # Looked at where the labels are: on the CPU that costs a device no wait.
    present = (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).any(-2)
    if not present.all():
        missing = int((~present).nonzero()[0, -1])
        raise ValueError(f"class {missing} has no query; latent MixUp needs one of every class.")
    labels = labels.to(device).expand(query.shape[:-1])
    pairs = torch.combinations(torch.arange(num_classes), 2)
    shape = (*query.shape[:-2], len(pairs))
    # Of each class the member with the largest number stands for it in a pair.
    keys = _drawn(torch.rand, (*shape, query.shape[-2]), generator).to(device)
    shares = _drawn(torch.rand, shape, generator) if alpha is None else torch.full(shape, float(alpha))
    masks = mixup_masks(shares, query.shape[-1], mask, generator).to(device)
    shares = shares.to(device).unsqueeze(-1)
    first, second = (
        torch.where(labels.unsqueeze(-2) == side.to(device).unsqueeze(-1), keys, -1.0).argmax(-1, keepdim=True)
        for side in pairs.T
    )

    def taken(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return values.gather(-2, rows.expand(*rows.shape[:-1], values.shape[-1]))

    mixed = torch.where(masks, taken(query, first), taken(query, second))
    probabilities = prototype_logits(query, prototypes, scale, distance).softmax(-1)
    target = shares * taken(probabilities, first) + (1 - shares) * taken(probabilities, second)
    error = prototype_logits(mixed, prototypes, scale, distance).softmax(-1) - target
    return error.square().sum((-1, -2)).mean()
