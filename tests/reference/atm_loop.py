"""Alternating tuning and merging in plain torch: the oracle of the loop. Imports nothing from hf_atm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch


def run(
    model: torch.nn.Module,
    batches: Callable[[int, str], list[dict]],
    tasks: list[str],
    rounds: int,
    make_optimizer: Callable,
    merge: Callable[[list[torch.Tensor]], torch.Tensor],
    max_grad_norm: float = 1.0,
    outer: Callable | None = None,
) -> torch.nn.Module:
    """Tune a copy of the model on every task, merge the flattened shared weights, repeat.

    `merge` maps the tasks' flat vectors to one flat update; `outer(update, round)` may change it.
    """
    model = copy.deepcopy(model)
    for round_index in range(rounds):
        start = flatten(model)
        vectors, heads = [], {}
        for task in tasks:
            tuned = copy.deepcopy(model)
            tuned.train()
            optimizer = make_optimizer([p for p in tuned.parameters() if p.requires_grad])
            for batch in batches(round_index, task):
                loss = tuned(**batch, task=task).loss
                tuned.zero_grad()
                loss.backward()
                used = [p for p in tuned.parameters() if p.grad is not None]
                torch.nn.utils.clip_grad_norm_(used, max_grad_norm)
                optimizer.step()
            vectors.append(flatten(tuned) - start)
            heads[task] = tuned.heads[task].state_dict()
        update = merge(vectors)
        if outer is not None:
            update = outer(update, round_index)
        unflatten(model, start + update)
        for task, state in heads.items():
            model.heads[task].load_state_dict(state)
    return model


def shared(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for name, p in sorted(model.named_parameters()) if not name.startswith("heads.")]


def flatten(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in shared(model)])


def unflatten(model: torch.nn.Module, flat: torch.Tensor) -> None:
    position = 0
    for p in shared(model):
        p.data = flat[position : position + p.numel()].view(p.shape).float()
        position += p.numel()


def mean(vectors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(vectors).mean(0)


def ties(vectors: list[torch.Tensor], density: float) -> torch.Tensor:
    """Keep the largest share of each whole vector, elect a sign, average those that agree."""
    kept = []
    for vector in vectors:
        count = round(density * vector.numel())
        order = sorted(range(vector.numel()), key=lambda i, v=vector: (-abs(float(v[i])), i))
        trimmed = torch.zeros_like(vector)
        trimmed[order[:count]] = vector[order[:count]]
        kept.append(trimmed)
    stack = torch.stack(kept)
    sign = stack.sum(0).sign()
    majority = 1.0 if float(sign.sum()) >= 0 else -1.0
    sign[sign == 0] = majority
    agree = (stack.sign() == sign) & (stack != 0)
    return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)
