"""LoRA in the loop: task vectors are the true weight updates that the adapter's factors stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .merging.adapters.factors import INEXACT_OPTIONS, leading_triplets
from .spaces import Space, TaskVector, WeightSpace


_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


class LoraTaskVector(TaskVector):
    """A task vector kept as adapter factors; each update is multiplied out when it is read.

    Args:
        space (`LoraSpace`): knows the layers and how their factors make an update.
        base (`Mapping[str, Tensor]`): the factors the round started from.
        factors (`dict[str, Tensor]`): the tuned factors and other shared parameters, by parameter name.
    """

    def __init__(self, space: LoraSpace, base: Mapping[str, Tensor], factors: dict[str, Tensor]) -> None:
        self.space = space
        self.base = base
        self._factors = factors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._factors

    def read(self, name: str) -> Tensor:
        if name not in self.space.layers:
            return self._factors[name] - self.base[name]
        return self.space.update(name, self._factors) - self.space.update(name, self.base)

    def __iter__(self) -> Iterator[str]:
        return iter(self.space.shapes)

    def __len__(self) -> int:
        return len(self.space.shapes)


class LoraSpace(Space):
    """The weight updates of one LoRA adapter, exact for any rank, alpha, rsLoRA, and patterns of them.

    In mode `"delta"` a merge adds the update to the frozen base weights and sets the factors back to where the round
    began. In mode `"svd"` the merged update is compressed back into the factors, by the best approximation of their
    rank, rotated towards the previous factors so that the optimizer meets familiar coordinates.

    Args:
        model (`PeftModel`): with exactly one active LoRA adapter.
        parameters (`Mapping[str, nn.Parameter]`): all shared trainable parameters, factors included.
        mode (`str`): `"delta"` or `"svd"`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where factors and task vectors live.

    Raises:
        ValueError: naming what the adapter uses that has no exact update (DoRA, `lora_bias`, quantised or
            half-precision base weights, adapters on tied weights, adapters that are not LoRA).
    """

    compact = True

    def __init__(
        self,
        model: PeftModel,
        parameters: Mapping[str, nn.Parameter],
        mode: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.mode = mode
        self.device = torch.device(device)
        self.adapter = check_adapter(model, mode)
        self.layers: dict[str, LoraLayer] = {
            name: module
            for name, module in sorted(model.named_modules())
            if isinstance(module, LoraLayer) and self.adapter in module.scaling
        }
        check_layers(model, self.layers, self.adapter, mode)
        owned = {id(factor) for layer in self.layers.values() for factor in self._factor_parameters(layer)}
        self.factors = WeightSpace({n: p for n, p in parameters.items() if id(p) in owned}, device)
        self.others = WeightSpace({n: p for n, p in parameters.items() if id(p) not in owned}, device)
        self._names = {id(parameter): name for name, parameter in self.factors.parameters.items()}
        for name, layer in self.layers.items():
            if any(id(factor) not in self._names for factor in self._factor_parameters(layer)):
                raise ValueError(
                    f"LoRA layer {name!r} is partly frozen or marked task-specific; train both of its factors, or use "
                    "lora_merge_mode='adapter'."
                )

    def _factor_parameters(self, layer: LoraLayer) -> list[nn.Parameter]:
        found = []
        for attribute in _FACTORS:
            holder = getattr(layer, attribute)
            if self.adapter in holder:
                factor = holder[self.adapter]
                found.append(factor if isinstance(factor, nn.Parameter) else factor.weight)
        return found

    def factor_names(self, name: str) -> tuple[str, str]:
        """Parameter names of a layer's factors A and B."""
        a, b = (self._names[id(parameter)] for parameter in self._factor_parameters(self.layers[name]))
        return a, b

    @property
    def shapes(self) -> dict[str, torch.Size]:
        shapes = {name: layer.get_base_layer().weight.shape for name, layer in self.layers.items()}
        return dict(sorted({**shapes, **self.others.shapes}.items()))

    def snapshot(self) -> dict[str, Tensor]:
        return {**self.factors.snapshot(), **self.others.snapshot()}

    def restore(self, base: Mapping[str, Tensor]) -> None:
        self.factors.restore(base)
        self.others.restore(base)

    def difference(self, base: Mapping[str, Tensor], name: str) -> Tensor:
        return LoraTaskVector(self, base, self.snapshot()).read(name)

    def capture(self, base: Mapping[str, Tensor]) -> LoraTaskVector:
        return LoraTaskVector(self, dict(base), self.snapshot())

    def revive(self, base: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> LoraTaskVector:
        return LoraTaskVector(self, dict(base), tensors)

    @torch.no_grad()
    def update(self, name: str, factors: Mapping[str, Tensor]) -> Tensor:
        """The weight update that `factors` stand for in layer `name`, in the layout of its weight, float32.

        PEFT multiplies them out itself, so scaling, patterns and layouts (Conv1D, convolutions, embeddings) are its.
        """
        layer = self.layers[name]
        live = self._factor_parameters(layer)
        held = [parameter.detach().clone() for parameter in live]
        for parameter in live:
            parameter.copy_(factors[self._names[id(parameter)]])
        update = layer.get_delta_weight(self.adapter).detach().to(self.device, torch.float32, copy=True)
        for parameter, value in zip(live, held, strict=True):
            parameter.copy_(value)
        return update

    @torch.no_grad()
    def advance(self, base: dict[str, Tensor], move: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            if self.mode == "delta":
                weight = layer.get_base_layer().weight
                weight.add_(move[name].to(weight.device))
            else:
                self._compress(name, base, self.update(name, base) + move[name])
        for name in self.others.parameters:
            # Not in place: vectors that were captured still refer to the old values.
            base[name] = base[name] + move[name]
        self.restore(base)

    @contextmanager
    def probe(self, base: Mapping[str, Tensor], move: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
        held = {name: tensor.clone() for name, tensor in self.checkpoint_weights().items()}
        try:
            self.advance(dict(base), {name: scale * move[name] for name in self.shapes})
            yield
        finally:
            self.load_checkpoint_weights(held)
            self.restore(base)

    def _compress(self, name: str, base: dict[str, Tensor], update: Tensor) -> None:
        layer = self.layers[name]
        a_name, b_name = self.factor_names(name)
        if getattr(layer, "fan_in_fan_out", False):
            update = update.T
        a, b = compress(update / layer.scaling[self.adapter], base[a_name])
        base[a_name], base[b_name] = a, b

    def checkpoint_weights(self) -> dict[str, Tensor]:
        if self.mode != "delta":
            return {}
        return {name: layer.get_base_layer().weight.detach() for name, layer in self.layers.items()}

    @torch.no_grad()
    def load_checkpoint_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.layers[name].get_base_layer().weight.copy_(tensor)


def check_adapter_setup(trainer: Any, space: Space, has_statistics: bool) -> None:
    """Refuse settings under which an adapter's checkpoints or references would not follow the merges.

    Raises:
        ValueError: naming the setting and the way out.
    """
    if not isinstance(trainer.model, PeftModel):
        return
    delta = isinstance(space, LoraSpace) and space.mode == "delta"
    if delta and trainer.args.save_only_model and str(trainer.args.save_strategy) != "no":
        raise ValueError(
            "save_only_model=True would save the adapter without the base weights that lora_merge_mode='delta' changes; "
            "leave it off, or use lora_merge_mode='svd'."
        )
    if delta and getattr(trainer, "ref_model", trainer) is None:
        raise ValueError(
            f"{type(trainer).__name__} takes the model without its adapter as reference, and lora_merge_mode='delta' "
            "moves that; use lora_merge_mode='svd', or pass ref_model."
        )
    if isinstance(space, LoraSpace) and trainer.args.task_vector_origin == "start":
        raise ValueError(
            f"task_vector_origin='start' needs whole weights, and lora_merge_mode={space.mode!r} starts an adapter anew "
            "in each round; use task_vector_origin='round', or lora_merge_mode='adapter'."
        )
    if isinstance(space, LoraSpace) and trainer.args.moment_exponent:
        raise ValueError(
            f"moment_exponent={trainer.args.moment_exponent} weighs entries of weights, and lora_merge_mode={space.mode!r} "
            "merges products of factors, of which AdamW knows nothing; set moment_exponent=0, or use "
            "lora_merge_mode='adapter'."
        )
    if not delta and has_statistics:
        raise ValueError(
            "A saved adapter holds no running statistics, and this model's batch normalisation changes them; use "
            "lora_merge_mode='delta', which saves the whole model."
        )


def compress(update: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The best factors of a given rank for a weight update, in coordinates close to the previous ones.

    Args:
        update (`Tensor`): `(out, in)`, float32.
        previous (`Tensor`): the A factor so far, `(rank, in)`; its rank is kept.

    Returns:
        `tuple[Tensor, Tensor]`: A `(rank, in)` and B `(out, rank)`, float32, with B A the truncated singular value
        decomposition of `update`. Directions without any update keep a nonzero row in A and a zero column in B, the
        state LoRA itself starts from.
    """
    rank = previous.shape[0]
    u, s, v = leading_triplets(update, rank)
    empty = s <= s.max().clamp_min(torch.finfo(torch.float32).tiny) * 1e-7
    root = torch.where(empty, 0.0, s.sqrt())
    a = torch.where(empty, previous.double().norm(dim=1).mean(), root)[:, None] * v.T
    b = u * root
    if a.shape[0] < rank:
        raise ValueError(
            f"A LoRA rank of {rank} exceeds a layer of shape {tuple(update.shape)}; lower the rank for "
            "lora_merge_mode='svd'."
        )
    # Any rotation between the factors leaves their product alone; take the one nearest to the previous A.
    left, _, right = torch.linalg.svd(a @ previous.double().T)
    rotation = left @ right
    return (rotation.T @ a).float(), (b @ rotation).float()


def check_adapter(model: Any, mode: str) -> str:
    """The name of the one active LoRA adapter.

    Raises:
        ValueError: when there is none or several, or its type or options have no exact weight update.
    """
    remedy = "use lora_merge_mode='adapter' to merge its parameters as they are"
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    if len(active) != 1:
        raise ValueError(f"lora_merge_mode={mode!r} needs exactly one active adapter, found {active}.")
    config: Any = model.peft_config[active[0]]
    if not isinstance(config, LoraConfig) or type(config).__name__ != "LoraConfig":
        raise ValueError(f"An adapter of type {config.peft_type} has no exact low-rank update; {remedy}.")
    unsupported = [option for option in INEXACT_OPTIONS if getattr(config, option, None)]
    if unsupported:
        raise ValueError(f"lora_merge_mode={mode!r} cannot be exact with {', '.join(unsupported)}; {remedy}.")
    return active[0]


def check_layers(model: nn.Module, layers: Mapping[str, LoraLayer], adapter: str, mode: str) -> None:
    """Refuse layers whose update cannot be added exactly.

    Raises:
        ValueError: naming the layer and what stands in the way.
    """
    if not layers:
        raise ValueError(f"The adapter {adapter!r} has no LoRA layer; check target_modules.")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        variant = layer.lora_variant.get(adapter)
        if variant is not None:
            raise ValueError(
                f"LoRA layer {name!r} uses the variant {type(variant).__name__}, which has no exact update; use "
                "lora_merge_mode='adapter'."
            )
        if mode == "delta" and weight.dtype != torch.float32:
            raise ValueError(
                f"lora_merge_mode='delta' adds to the base weights, and {name!r} is {weight.dtype}; load the model "
                "with dtype=torch.float32, or use lora_merge_mode='svd'."
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"The base weight of {name!r} is quantised ({weight.dtype}); use lora_merge_mode='adapter'."
            )
        if mode == "delta" and len(owners.get(id(weight), [])) > 1:
            raise ValueError(
                f"The base weight of {name!r} is tied ({', '.join(owners[id(weight)])}), so adding to it would change "
                "both; leave it out of target_modules, or use lora_merge_mode='svd'."
            )
        if mode == "svd" and weight.ndim != 2:
            raise ValueError(
                f"lora_merge_mode='svd' works on matrices, and {name!r} has shape {tuple(weight.shape)}; use 'delta'."
            )
