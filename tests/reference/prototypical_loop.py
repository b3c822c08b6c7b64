"""One round over a linear encoder, of a task with prototypes and one with a classifier: the oracle of prototypical heads.
Imports nothing from hf_atm."""

from __future__ import annotations

import torch


def one_round(
    weight: torch.Tensor,
    bias: torch.Tensor,
    log_scale: torch.Tensor,
    classifier: tuple[torch.Tensor, torch.Tensor],
    few: tuple[torch.Tensor, list[list[tuple[list[list[int]], list[list[int]]]]]],
    many: tuple[torch.Tensor, torch.Tensor, list[list[int]]],
    rate: float,
) -> dict[str, torch.Tensor]:
    """Gradient descent on each task from the same encoder `x -> weight x + bias`, then the mean of both encoders.

    `few` is features and, for every step, its episodes: support and query rows, one list per class. `many` is features,
    labels and the rows of every step.
    """
    start = [weight.double(), bias.double()]

    x, steps = few[0].double(), few[1]
    encoder, scale = [tensor.clone().requires_grad_() for tensor in start], log_scale.double().requires_grad_()
    for episodes in steps:
        losses = []
        for support, query in episodes:
            means = [sum(encode(encoder, x[row]) for row in rows) / len(rows) for rows in support]
            for label, rows in enumerate(query):
                for row in rows:
                    z = encode(encoder, x[row])
                    logits = [-torch.exp(scale) * ((z - mean) ** 2).sum() for mean in means]
                    losses.append(-(logits[label] - torch.log(sum(torch.exp(logit) for logit in logits))))
        descend([*encoder, scale], sum(losses) / len(losses), rate)
    first = encoder

    x, labels = many[0].double(), many[1]
    encoder = [tensor.clone().requires_grad_() for tensor in start]
    head = [tensor.double().requires_grad_() for tensor in classifier]
    for rows in many[2]:
        losses = []
        for row in rows:
            logits = encode(head, encode(encoder, x[row]))
            losses.append(-(logits[labels[row]] - torch.log(torch.exp(logits).sum())))
        descend([*encoder, *head], sum(losses) / len(losses), rate)

    merged = [(a + b).detach() / 2 for a, b in zip(first, encoder, strict=True)]
    return {
        "body.weight": merged[0],
        "body.bias": merged[1],
        "heads.few.log_scale": scale.detach(),
        "heads.many.weight": head[0].detach(),
        "heads.many.bias": head[1].detach(),
    }


def encode(layer: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return layer[0] @ x + layer[1]


def descend(tensors: list[torch.Tensor], loss: torch.Tensor, rate: float) -> None:
    gradients = torch.autograd.grad(loss, tensors)
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor -= rate * gradient
