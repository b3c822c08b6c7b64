"""LoRA results on disk: the merged model without its adapter, and one adapter per expert."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from .lora import LoraSpace, LoraTaskVector
from .merging.adapters.factors import balanced, leading_triplets
from .rounds import RoundState


def merged_state_dict(model: PeftModel, space: LoraSpace) -> dict[str, Tensor]:
    """The weights of the model inside an adapter, under the names it has without one.

    Args:
        model (`PeftModel`): base weights hold the merged updates.
        space (`LoraSpace`): the adapter; whatever update its present factors stand for is added.

    Returns:
        `dict[str, Tensor]`: a state dict of `model.get_base_model()` before it was wrapped.
    """
    saved, state = f".modules_to_save.{space.adapter}.", {}
    prefix = "base_model.model."
    for name, tensor in model.get_base_model().state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        if ".base_layer." in name:
            layer, _, leaf = name.rpartition(".base_layer.")
            if leaf == "weight":
                update = space.layers[prefix + layer].get_delta_weight(space.adapter)
                tensor = tensor + update.to(tensor) if update.any() else tensor
            name = f"{layer}.{leaf}"
        state[name.replace(saved, ".")] = tensor
    return state


@torch.no_grad()
def save_expert_adapters(model: PeftModel, rounds: RoundState, output_dir: str, base_name: str) -> None:
    """Write `adapters/<task>/`, one PEFT adapter per expert of the last finished round.

    In mode `"delta"` an adapter applies to the merged model in `output_dir` and turns it into the expert: the
    difference of the two has rank (tasks x rank) for linear merges, written exactly; for other merges it is cut to
    that rank by singular value decomposition. In mode `"svd"` an adapter applies to the pretrained model.

    Args:
        model (`PeftModel`): the trained model.
        rounds (`RoundState`): holds the last round's factors; nothing is written when it has none.
        output_dir (`str`): where the merged model lies.
        base_name (`str`): written as the adapters' base model.
    """
    space = rounds.space
    assert isinstance(space, LoraSpace)
    for task in rounds.tasks:
        # Of an earlier save, whose merged model is being replaced.
        shutil.rmtree(os.path.join(output_dir, "adapters", task), ignore_errors=True)
    moves = rounds.last_move() if space.mode == "delta" and rounds.linear_shares() is None else {}
    for task, vector in rounds.merged_vectors.items():
        assert isinstance(vector, LoraTaskVector)
        folder = os.path.join(output_dir, "adapters", task)
        beside = f"{folder}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        if space.mode == "svd":
            live, held = space.snapshot(), {**dict(model.named_parameters()), **dict(model.named_buffers())}
            heads = {name: held[name].detach().clone() for name in rounds.expert_heads.get(task, {})}
            space.restore(vector.tensors)
            for name in heads:
                held[name].copy_(rounds.expert_heads[task][name])
            model.save_pretrained(beside)
            space.restore(live)
            for name, value in heads.items():
                held[name].copy_(value)
        else:
            _save_difference(model, rounds, task, moves, beside, base_name)
        os.rename(beside, folder)


def _save_difference(
    model: PeftModel, rounds: RoundState, task: str, moves: Mapping[str, Tensor], folder: str, base_name: str
) -> None:
    space: Any = rounds.space
    state = get_peft_model_state_dict(model, adapter_name=space.adapter)
    shares = rounds.linear_shares()
    for name, tensor in rounds.expert_heads.get(task, {}).items():
        state[name.replace(f".modules_to_save.{space.adapter}.", ".")] = tensor
    # Shared parameters beside the factors, with the expert's values.
    for name in space.others.parameters:
        state[name.replace(f".modules_to_save.{space.adapter}.", ".")] = rounds.merged_vectors[task].tensors[name]
    ranks = {}
    for name, layer in space.layers.items():
        a_name, b_name = space.factor_names(name)
        if shares is not None:
            a, b = _stack(rounds.merged_vectors, task, shares, a_name, b_name, layer.scaling[space.adapter])
        else:
            a, b = _truncate(rounds, task, name, moves[name], layer)
        state[a_name.replace(f".{space.adapter}", "")], state[b_name.replace(f".{space.adapter}", "")] = a, b
        ranks[name.removeprefix("base_model.model.")] = a.shape[0]
    rank = max(ranks.values())
    pattern = {f"^{name}": value for name, value in ranks.items() if value != rank}
    # With alpha equal to the rank the scaling is 1: the factors hold all of it.
    config = dataclasses.replace(
        model.peft_config[space.adapter],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        init_lora_weights=True,
        inference_mode=True,
        base_model_name_or_path=base_name,
    )
    os.makedirs(folder)
    config.save_pretrained(folder)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(contiguous, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def _stack(
    vectors: Mapping[str, Any], task: str, shares: Mapping[str, float], a_name: str, b_name: str, scaling: float
) -> tuple[Tensor, Tensor]:
    """Factors of (expert - merged) for a linear merge: own update times (1 - share), the others' times -share."""
    terms = [
        (factors[a_name], factors[b_name] * (scaling * ((other == task) - shares[other])))
        for other, factors in ((other, vector.tensors) for other, vector in vectors.items())
    ]
    base = next(iter(vectors.values())).base
    remainder = sum(shares.values()) - 1
    if base[b_name].any() and remainder:
        terms.append((base[a_name], base[b_name] * (scaling * remainder)))
    return torch.cat([a for a, _ in terms]), torch.cat([b for _, b in terms], dim=1)


def _truncate(rounds: RoundState, task: str, name: str, move: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
    difference = rounds.merged_vectors[task].read(name) - move
    if difference.ndim != 2:
        raise ValueError(
            f"The expert of {task!r} cannot be written as an adapter: layer {name!r} is no matrix and "
            f"merge_method={rounds.method!r} is not linear."
        )
    if getattr(layer, "fan_in_fan_out", False):
        difference = difference.T
    rank = min(len(rounds.tasks) * layer.r[rounds.space.adapter], *difference.shape)  # type: ignore[attr-defined]
    factors = balanced(*leading_triplets(difference, rank))
    return factors.right.float(), factors.left.float()
