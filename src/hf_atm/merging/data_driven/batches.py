"""Running any torch model over the batches of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def model_inputs(batch: Any, extra: Mapping[str, Any] | None = None) -> tuple[tuple, dict[str, Any]]:
    """
    Positional and keyword arguments of a model for a batch.

    Args:
        batch (`Any`):
            A mapping is passed as keywords. Of a tuple or list the first item is the input; labels may follow.
        extra (`Mapping[str, Any]`, *optional*):
            Further keywords, such as `{"task": "sst2"}`.
    """
    if isinstance(batch, Mapping):
        return (), {**batch, **(extra or {})}
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), dict(extra or {})


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, `logits` of a mapping or object, or a tuple's first item."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor):
        raise ValueError(f"The model returned {type(output).__name__} without logits; return a tensor or `logits`.")
    return first


def batch_size(batch: Any) -> int:
    """Number of examples: the length of the first tensor."""
    for tensor in _tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise ValueError(
        f"A batch of type {type(batch).__name__} holds no tensors; give it tensors with examples as rows."
    )


def part_of_batch(batch: Any, start: int, stop: int) -> Any:
    """Examples `[start, stop)`; what has no row per example stays whole."""
    size = batch_size(batch)
    return _map(batch, lambda tensor: tensor[start:stop] if tensor.ndim and len(tensor) == size else tensor)


def batches(dataloader: Iterable, num_examples: int | None, device: torch.device) -> Iterator[tuple[Any, int]]:
    """
    Batches on the device with their sizes, up to a number of examples, which the batch size does not round.

    Raises:
        `ValueError`: if there is no example.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples={num_examples} leaves nothing to measure; give at least 1, or None for all.")
    seen = 0
    for batch in dataloader:
        size = batch_size(batch)
        if num_examples is not None and seen + size > num_examples:
            size = num_examples - seen
            batch = part_of_batch(batch, 0, size)
        seen += size
        yield _map(batch, lambda tensor: tensor.to(device)), size
        if seen == num_examples:
            return
    if seen == 0:
        raise ValueError("The DataLoader gave no batch; give it at least one example.")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def problem_of(model: nn.Module) -> str | None:
    """The `problem_type` of a transformers configuration, if there is one."""
    return getattr(getattr(model, "config", None), "problem_type", None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers configuration says that the model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards, errors included."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def observing(hooks: Mapping[nn.Module, Callable[[Any, tuple], None]]) -> Iterator[None]:
    """Hooks `hook(module, args)` before each module's forward pass inside, none afterwards, errors included."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def progress_bar(total: int | None, description: str, disable: bool) -> Any:
    """A progress bar to be used in a `with` statement."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, disable=disable)


def _tensors(batch: Any) -> Iterator[Tensor]:
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return (item for item in items if isinstance(item, Tensor))


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def apply(item: Any) -> Any:
        return change(item) if isinstance(item, Tensor) else item

    if isinstance(batch, Mapping):
        return {key: apply(item) for key, item in batch.items()}
    return type(batch)(map(apply, batch)) if isinstance(batch, (tuple, list)) else apply(batch)
