"""Gram matrices of layer inputs, measured over a DataLoader; what RegMean merges with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spectral.matrices import NON_MATRIX
from ..tensors import accumulation_dtype, result_dtype
from .batches import batches, device_of, evaluating, is_encoder_decoder, model_inputs, observing, progress_bar


# Keys and values of cross-attention inside a decoder are computed from what the encoder saw.
_READS_ENCODER = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")


def collect_gram(
    model: nn.Module,
    dataloader: Iterable,
    num_examples: int | None = 256,
    exclude: Sequence[str] = NON_MATRIX,
    inputs: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
) -> dict[str, Tensor]:
    """
    Measures `X.T @ X / num_examples` of the inputs X of every linear layer, the statistics of `regmean`
    (https://huggingface.co/papers/2212.09849).

    Rows of X are the positions of all examples, padding left out. Layers are `nn.Linear`, transformers' `Conv1D` and
    `nn.Conv2d` with one group, whose rows are unfolded patches. Dividing by the number of examples lets models count
    alike that were measured on different numbers of them. The result is a plain dictionary; write it with
    `safetensors.torch.save_file` and give the path to the merge.

    Args:
        model (`nn.Module`):
            The fine-tuned model.
        dataloader (`Iterable`):
            Batches of its task: mappings (passed as keywords), tensors, or tuples whose first item is the input. An
            `attention_mask` (for decoders beside encoders a `decoder_attention_mask`) of shape
            `(batch_size, sequence_length)` tells padding.
        num_examples (`int`, *optional*, defaults to 256):
            Examples to use, whatever the batch size; `None` for all.
        exclude (`Sequence[str]`, *optional*):
            Name patterns of weights to leave out; by default embeddings and language-model heads, which are averaged.
            Excluding parts in several calls bounds memory.
        inputs (`Mapping[str, Any]`, *optional*):
            Further keywords of the model, such as `{"task": "sst2"}`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        `dict[str, Tensor]`: name of the weight to `(n, n)` float32 matrix on the CPU, n the layer's inputs (for
        convolutions channels times kernel). Layers that did not run are missing.

    Raises:
        `ValueError`: if the DataLoader is empty or no such layer ran.

    Cost: one forward pass, and `rows * n**2` per layer; memory `8 n**2` bytes per layer, beside the model.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import collect_gram, merge_state_dicts

    >>> layers = [torch.nn.Linear(4, 2) for _ in range(2)]
    >>> statistics = [collect_gram(layer, [torch.randn(32, 4)], disable_tqdm=True) for layer in layers]
    >>> merge_state_dicts(layers, method="regmean", statistics=statistics)["weight"].shape
    torch.Size([2, 4])
    ```
    """
    names = _observed_weights(model, exclude)
    masks: dict[str, Tensor] = {}
    sums: dict[nn.Parameter, Tensor] = {}
    encoder_decoder = is_encoder_decoder(model)

    def observer(name: str) -> Callable[[Any, tuple], None]:
        source = _mask_name(name, encoder_decoder)

        def observe(module: Any, args: tuple) -> None:
            rows = _rows(module, args[0].detach(), masks.get(source))
            gram = rows.T @ rows
            if module.weight in sums:
                sums[module.weight] += gram
            else:
                sums[module.weight] = gram

        return observe

    hooks = {
        module: observer(name)
        for name, module in model.named_modules()
        if _is_linear(module) and module.weight in names
    }
    seen = 0
    bar = progress_bar(num_examples, "Gram matrices", disable_tqdm)
    with evaluating(model), observing(hooks), torch.no_grad(), bar:
        for batch, size in batches(dataloader, num_examples, device_of(model)):
            masks.clear()
            masks.update(_masks(batch))
            args, kwargs = model_inputs(batch, inputs)
            model(*args, **kwargs)
            seen += size
            bar.update(size)
    if not sums:
        raise ValueError("No linear layer outside exclude ran; check the model and the patterns in exclude.")
    return {
        name: (total / seen).to(result_dtype(weight.dtype), copy=True).cpu()
        for weight, total in sums.items()
        for name in names[weight]
    }


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    # Transformers' Conv1D, known by name so that transformers need not be there.
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _observed_weights(model: nn.Module, exclude: Sequence[str]) -> dict[Any, list[str]]:
    """Weights of linear layers with all their names; layers that share a weight share a matrix."""
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear(module):
            names.setdefault(module.weight, []).append(f"{name}.weight" if name else "weight")
    return {
        weight: keys
        for weight, keys in names.items()
        if not any(fnmatchcase(key, pattern) for key in keys for pattern in exclude)
    }


def _mask_name(name: str, encoder_decoder: bool) -> str:
    own = encoder_decoder and "decoder." in f"{name}." and not any(part in name for part in _READS_ENCODER)
    return "decoder_attention_mask" if own else "attention_mask"


def _masks(batch: Any) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        return {}
    names = ("attention_mask", "decoder_attention_mask")
    found = {name: batch.get(name) for name in names}
    return {name: mask != 0 for name, mask in found.items() if isinstance(mask, Tensor) and mask.ndim == 2}


def _rows(module: nn.Module, values: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs of a layer as rows, one precision up, without padding."""
    values = values.to(accumulation_dtype(values.dtype))
    if isinstance(module, nn.Conv2d):
        images = values.reshape(-1, *values.shape[-3:])
        sides: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
        patches = functional.unfold(images, *sides)
        return patches.transpose(1, 2).flatten(0, 1)
    rows = values.reshape(-1, values.shape[-1])
    # Some layers see sequences that were flattened, or one vector per sequence, which no mask concerns.
    matches = mask is not None and (values.shape[:-1] == mask.shape or values.shape[:-1] == (mask.numel(),))
    return rows[mask.reshape(-1)] if matches and mask is not None else rows
