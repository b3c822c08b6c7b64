"""Diagonal Fisher information, measured over a DataLoader; what Fisher merging weighs entries with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors import result_dtype
from .batches import (
    batches,
    device_of,
    evaluating,
    is_encoder_decoder,
    logits_of,
    model_inputs,
    part_of_batch,
    problem_of,
    progress_bar,
)


_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def collect_fisher(
    model: nn.Module,
    dataloader: Iterable,
    num_examples: int | None = 256,
    labels: str = "model",
    num_samples: int | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
) -> dict[str, Tensor]:
    """
    Measures the diagonal of the Fisher information, the statistics of `fisher`
    (https://huggingface.co/papers/2111.09832).

    `F = mean_x E_y[(d log p(y|x) / d theta)**2]`, gradients of single examples, y distributed as the model says:

    - one label: the exact expectation over all classes, or over `num_samples` draws;
    - several labels: exact, `sum_j p_j (1 - p_j) (d z_j)**2` over the logits z;
    - regression: exact for unit variance, `sum_j (d z_j)**2`;
    - tokens (logits of three dimensions): `num_samples` draws (one by default) of a label at each position that is not
      padding, for causal language models given the tokens before; a sequence is one example.

    The result is a plain dictionary; write it with `safetensors.torch.save_file` and give the path to the merge.

    Args:
        model (`nn.Module`):
            The fine-tuned model; parameters that require no gradient are left out.
        dataloader (`Iterable`):
            Batches of its task: mappings (passed as keywords), tensors, or tuples whose first item is the input.
        num_examples (`int`, *optional*, defaults to 256):
            Examples to use, whatever the batch size; `None` for all.
        labels (`str`, *optional*, defaults to `"model"`):
            `"model"` as above, or `"given"`: the empirical Fisher, squared gradients of the loss that the model itself
            returns for each example (for tokens their mean loss).
        num_samples (`int`, *optional*):
            Draws per example in place of the exact expectation, at least 1; for many classes.
        problem_type (`str`, *optional*):
            `"single_label_classification"`, `"multi_label_classification"` or `"regression"`. By default the model
            configuration's; without one, one logit means regression and several mean classes.
        seed (`int`, *optional*, defaults to 0):
            Decides the draws.
        inputs (`Mapping[str, Any]`, *optional*):
            Further keywords of the model, such as `{"task": "sst2"}`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        `dict[str, Tensor]`: name of the parameter (tied ones under every name) to a non-negative tensor of its shape,
        float32 (float64 for float64 parameters), on the CPU.

    Raises:
        `ValueError`: if the DataLoader is empty, no parameter requires a gradient, an option is unknown, or the model
            returns no loss for `"given"`.

    Cost: per example one forward pass and one backward pass per class (draw, logit); memory two copies of the
    parameters beside the model.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import collect_fisher, merge_state_dicts

    >>> models = [torch.nn.Linear(4, 3) for _ in range(2)]
    >>> statistics = [collect_fisher(model, [torch.randn(32, 4)], disable_tqdm=True) for model in models]
    >>> merge_state_dicts(models, method="fisher", statistics=statistics)["weight"].shape
    torch.Size([3, 4])
    ```
    """
    if labels not in ("model", "given"):
        raise ValueError(f"labels={labels!r} is unknown; choose 'model' or 'given'.")
    if problem_type not in (None, *_PROBLEMS):
        raise ValueError(f"problem_type={problem_type!r} is unknown; choose one of {', '.join(_PROBLEMS)}.")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} draws nothing; give at least 1.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("No parameter of the model requires a gradient; call model.requires_grad_(True) first.")
    generator = torch.Generator().manual_seed(seed)
    totals = [torch.zeros_like(parameter, dtype=result_dtype(parameter.dtype)) for parameter in parameters]
    encoder_decoder = is_encoder_decoder(model)
    seen = 0

    def scores(output: Any, example: Any) -> list[tuple[float, Tensor]]:
        if labels == "given":
            return [(1.0, _loss_of(output))]
        logits = logits_of(output)
        problem = problem_type or problem_of(model) or ("regression" if logits.shape[-1] == 1 else _PROBLEMS[0])
        return list(_scores(logits, problem, _mask_of(example, logits, encoder_decoder), num_samples, generator))

    with evaluating(model), torch.enable_grad(), progress_bar(num_examples, "Fisher", disable_tqdm) as bar:
        for batch, size in batches(dataloader, num_examples, device_of(model)):
            for index in range(size):
                example = part_of_batch(batch, index, index + 1)
                args, kwargs = model_inputs(example, inputs)
                _add_squares(totals, scores(model(*args, **kwargs), example), parameters)
                bar.update()
            seen += size
    found = {id(parameter): total / seen for parameter, total in zip(parameters, totals, strict=True)}
    return {
        name: found[id(parameter)].to("cpu", copy=True)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def _add_squares(totals: list[Tensor], scores: list[tuple[float, Tensor]], parameters: list[nn.Parameter]) -> None:
    for position, (weight, score) in enumerate(scores, 1):
        gradients = torch.autograd.grad(score, parameters, retain_graph=position < len(scores), allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to(total.dtype)
                total.addcmul_(gradient, gradient, value=weight)


def _scores(
    logits: Tensor, problem: str, mask: Tensor | None, num_samples: int | None, generator: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """Terms of one example's Fisher information: weight, and the scalar whose squared gradient it multiplies."""
    if logits.ndim > 2:
        positions = logits.flatten(0, -2)
        positions = positions if mask is None else positions[mask]
        yield from _drawn(positions.log_softmax(dim=-1), num_samples or 1, generator)
    elif problem == "regression":
        yield from ((1.0, logit) for logit in logits.reshape(-1))
    elif problem == "multi_label_classification":
        spread = logits.detach().sigmoid() * (1 - logits.detach().sigmoid())
        yield from zip(spread.reshape(-1).tolist(), logits.reshape(-1), strict=True)
    elif num_samples is not None:
        yield from _drawn(logits.log_softmax(dim=-1), num_samples, generator)
    else:
        log_probabilities = logits.log_softmax(dim=-1).reshape(-1)
        yield from zip(log_probabilities.detach().exp().tolist(), log_probabilities, strict=True)


def _drawn(log_probabilities: Tensor, count: int, generator: torch.Generator) -> Iterator[tuple[float, Tensor]]:
    # Drawn on the CPU, so that the labels are the same on every device.
    probabilities = log_probabilities.detach().double().exp().cpu()
    labels = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    for drawn in labels.T.to(log_probabilities.device):
        yield 1 / count, log_probabilities.gather(-1, drawn[:, None]).sum()


def _mask_of(example: Any, logits: Tensor, encoder_decoder: bool) -> Tensor | None:
    """Positions that are not padding, flat, for logits over tokens."""
    if not isinstance(example, Mapping):
        return None
    # The ignored label of the loss is padding only where labels are the decoder's own tokens.
    padding = {"decoder_attention_mask": 0, "labels": -100} if encoder_decoder else {"attention_mask": 0}
    for name, value in padding.items():
        tensor = example.get(name)
        if isinstance(tensor, Tensor) and tensor.shape == logits.shape[:-1]:
            return tensor.reshape(-1) != value
    return None


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError("The model returned no loss for labels='given'; put labels into the batches.")
    return loss
