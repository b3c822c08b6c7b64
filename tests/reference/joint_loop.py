"""Joint multi-task training in plain torch: the oracle of the baseline. Imports nothing from hf_atm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch


def run(
    model: torch.nn.Module,
    batches: Iterable[tuple[str, dict]],
    make_optimizer: Callable,
    max_grad_norm: float = 1.0,
    rate: Callable[[int], float] = lambda step: 1.0,
) -> torch.nn.Module:
    """Train a copy of the model on a stream of (task, batch), one optimizer for everything."""
    model = copy.deepcopy(model)
    model.train()
    optimizer = make_optimizer(list(model.parameters()))
    first = optimizer.param_groups[0]["lr"]
    for step, (task, batch) in enumerate(batches):
        loss = model(**batch, task=task).loss
        optimizer.zero_grad()
        loss.backward()
        used = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(used, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = first * rate(step)
        optimizer.step()
    return model
