"""Embeddings of a data set, from any encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from tqdm.auto import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..backbones import take_backbone
from ..modeling import MultiTaskModel
from ..task_modules import fitting_inputs, mask_positions, pool_hidden
from .ids import as_ids
from .spaces import EmbeddingSet


POOLINGS = ("auto", "cls", "mean", "pooler", "last")
_ID_NAMES = ("ids", "id", "idx")
_LABEL_NAMES = ("labels", "label")


def extract_embeddings(
    model: Any,
    dataloader: Any,
    pooling: str | Callable[[Any, Any], Tensor] = "auto",
    layer: int = -1,
    device: torch.device | str | None = None,
    task: str = "model",
    progress: bool = True,
) -> EmbeddingSet:
    """
    Runs an encoder over a data set.

    Args:
        model ([`~transformers.PreTrainedModel`], `nn.Module` or `Callable`):
            A text or image encoder, a decoder, a model with a head (whose backbone is taken), a [`MultiTaskModel`], a
            PEFT model, or anything that maps a batch to embeddings `(batch, width)`. Modules are set to evaluation and
            put back; other modules are called with a batch's inputs, other callables with all of it.
        dataloader (`DataLoader`):
            Batches are mappings, or tuples of inputs, labels and ids of which the last two may be missing. Ids are read
            from `ids`, `id` or `idx`; without them samples are numbered by row, and the order must be fixed. Integer
            `labels` or `label`, one per sample, are classes; others are left out.
        pooling (`str` or `Callable`, *optional*, defaults to `"auto"`):
            `"cls"` (first token), `"mean"` (over real tokens, or over an image's places), `"pooler"` (the model's
            own), `"last"` (last real token), or a function of outputs and batch. `"auto"`: what the model projects or
            pools for images, the last token for decoders, the mean for everything else.
        layer (`int`, *optional*, defaults to -1):
            Index into the hidden states, of which the first is the embedding layer; -1 is the model's own output.
        device (`torch.device` or `str`, *optional*):
            Where to compute; by default where the model is.
        task (`str`, *optional*, defaults to `"model"`):
            Name of the set.
        progress (`bool`, *optional*, defaults to `True`):
            A bar over the batches, on terminals only.

    Returns:
        [`EmbeddingSet`]: in the order of the data.

    Raises:
        `KeyError`: for an unknown pooling.
        `ValueError`: for shuffled data without ids, rows that the loader would drop, embeddings that are not one vector
            per sample, of one width, finite.
    """
    if not callable(pooling) and pooling not in POOLINGS:
        raise KeyError(f"Unknown pooling {pooling!r}; known ones are {', '.join(POOLINGS)}.")
    if not callable(model):
        raise ValueError(f"A {type(model).__name__} cannot be called; give a model or a function of a batch.")
    encode = _encoder(model, pooling, layer)
    found: list[tuple[Tensor, Any, Any]] = []
    with _evaluating(model, device) as place, torch.no_grad():
        for batch in tqdm(dataloader, desc=f"embedding {task}", disable=None if progress else True):
            batch = _to(batch, place)
            inputs, labels, ids = _parts(batch)
            if ids is None and not found:
                _check_order(dataloader)
            rows = encode(inputs, batch)
            if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
                shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(f"The encoder of {task!r} gave {shape}, not embeddings (batch, width); see pooling.")
            if found and rows.shape[1] != found[0][0].shape[1]:
                raise ValueError(
                    f"The encoder of {task!r} gave embeddings {found[0][0].shape[1]} wide and then {rows.shape[1]} "
                    "wide; a space has one width."
                )
            found.append((rows.float().cpu(), _classes(labels, len(rows)), ids))
    if not found:
        raise ValueError(f"The data of {task!r} hold no batch.")
    embeddings = torch.cat([rows for rows, _, _ in found])
    parts = [labels for _, labels, _ in found if labels is not None]
    known = [as_ids(ids) for _, _, ids in found if ids is not None]
    if 0 < len(known) < len(found):
        raise ValueError(f"Some batches of {task!r} carry ids and others do not.")
    return EmbeddingSet(
        task,
        np.concatenate(known) if known else np.arange(len(embeddings)),
        embeddings,
        torch.cat(parts) if len(parts) == len(found) else None,
    )


def _encoder(model: Any, pooling: Any, layer: int) -> Callable[[Any, Any], Any]:
    """A function of a batch's inputs, and of the whole batch, that gives embeddings."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "The adapter learned a prompt, which the encoder inside it does not see; give an adapter that changes weights, "
            "such as LoRA."
        )
    if isinstance(plain, PreTrainedModel):
        # A projection is part of what an encoder says, not a head.
        whole = type(plain).__name__.endswith("WithProjection")
        backbone = plain if whole else plain.backbone if isinstance(plain, MultiTaskModel) else take_backbone(plain)
        if backbone.config.is_encoder_decoder:
            backbone = backbone.get_encoder()
        return _HuggingFaceEncoder(backbone, pooling, layer)
    if pooling == "auto" or callable(pooling):

        def call(inputs: Any, batch: Any) -> Any:
            if not isinstance(model, nn.Module):
                outputs = model(batch)
            else:
                outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            return pooling(outputs, batch) if callable(pooling) else outputs

        return call
    raise ValueError(f"pooling={pooling!r} is for transformers models; give a function of outputs and batch instead.")


class _HuggingFaceEncoder:
    def __init__(self, backbone: PreTrainedModel, pooling: Any, layer: int) -> None:
        self.backbone, self.pooling, self.layer = backbone, pooling, layer
        self.accepted = frozenset(inspect.signature(type(backbone).forward).parameters)
        config = type(backbone.config)
        self.decoder = config in MODEL_FOR_CAUSAL_LM_MAPPING and config not in MODEL_FOR_MASKED_LM_MAPPING
        self.pixels = backbone.main_input_name == "pixel_values"
        if pooling == "pooler" and layer != -1:
            raise ValueError(f"pooling='pooler' belongs to the last layer, not to layer={layer}; choose cls or mean.")

    def __call__(self, inputs: Any, batch: Any) -> Any:
        if not isinstance(inputs, Mapping):
            inputs = {self.backbone.main_input_name: inputs}
        taken = {name: value for name, value in inputs.items() if name in self.accepted and value is not None}
        if not taken:
            raise ValueError(
                f"A {type(self.backbone).__name__} takes {self.backbone.main_input_name}, and a batch holds "
                f"{', '.join(map(str, inputs)) or 'nothing'}; prepare the data with the model's own processor."
            )
        inputs = fitting_inputs(taken, self.accepted)
        if self.decoder:
            inputs = mask_positions(inputs, self.accepted)
        wanted = {"output_hidden_states": True} if self.layer != -1 else {}
        outputs = self.backbone(**inputs, **wanted)
        if self.layer != -1:
            states = outputs.hidden_states
            if not -len(states) <= self.layer < len(states):
                raise ValueError(f"layer={self.layer}, but there are {len(states)} hidden states, from 0.")
            outputs = BaseModelOutput(last_hidden_state=states[self.layer])
        if callable(self.pooling):
            return self.pooling(outputs, batch)
        if self.pooling == "auto" and outputs.get("image_embeds") is not None:
            return outputs.image_embeds
        return pool_hidden(self._pooling(outputs), outputs, inputs, self.backbone)

    def _pooling(self, outputs: Any) -> str:
        """The name that heads use for it."""
        pooling = self.pooling
        if pooling == "auto":
            has_pooler = self.pixels and outputs.get("pooler_output") is not None
            pooling = "pooler" if has_pooler else "last" if self.decoder else "mean"
        if pooling == "mean" and self.pixels:
            return "image_pool"
        return "last_token" if pooling == "last" else pooling


@contextmanager
def _evaluating(model: Any, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model without dropout, on a device; afterwards as it was."""
    if not isinstance(model, nn.Module):
        yield torch.device(device or "cpu")
        return
    first = next((tensor for tensor in (*model.parameters(), *model.buffers())), torch.empty(0))
    place = first.device if device is None else torch.device(device)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        if place != first.device:
            model.to(place)
        yield place
    finally:
        for module in training:
            module.training = True
        if place != first.device:
            model.to(first.device)


def _to(batch: Any, place: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(place)
    if isinstance(batch, Mapping):
        return {name: _to(value, place) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_to(value, place) for value in batch)
    return batch


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, labels and ids."""
    if isinstance(batch, Mapping):
        aside = (*_ID_NAMES, *_LABEL_NAMES, "task")
        ids, labels = (
            next((batch[name] for name in names if name in batch), None) for names in (_ID_NAMES, _LABEL_NAMES)
        )
        return {name: value for name, value in batch.items() if name not in aside}, labels, ids
    if isinstance(batch, tuple | list):
        inputs, labels, ids = (*batch, None, None)[:3]
        return inputs, labels, ids
    return batch, None, None


def _classes(labels: Any, count: int) -> Tensor | None:
    """Labels that are one class per sample."""
    if labels is None:
        return None
    labels = torch.as_tensor(labels).detach().cpu()
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return labels.long() if whole and labels.shape == (count,) else None


def _check_order(dataloader: Any) -> None:
    """Refuses row numbers that would name other samples in the next run over the data, or leave some out."""
    if isinstance(dataloader, DataLoader) and not isinstance(dataloader.dataset, IterableDataset):
        batches = dataloader.batch_sampler
        # A loader that is given batches has a sampler that it does not use.
        sampler = dataloader.sampler if batches is None else getattr(batches, "sampler", None)
        in_order = type(batches) in (BatchSampler, type(None)) and type(sampler) is SequentialSampler
    else:
        in_order = True
    if not in_order:
        raise ValueError(
            "The data loader does not read its data in order and its batches carry no ids, so row numbers would name other samples each time; "
            "set shuffle=False, or add a column 'ids'."
        )
    if getattr(dataloader, "drop_last", False) and len(dataloader.dataset) % (dataloader.batch_size or 1):
        raise ValueError("The data loader drops its last rows; set drop_last=False, so that every sample is embedded.")
