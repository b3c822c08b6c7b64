"""Does a specification keep the network's function?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..merging.data_driven.batches import evaluating, logits_of, model_inputs
from .inputs import check_models
from .permutation import Permutation
from .spec import PermutationSpec


def check_permutation_spec(
    model: nn.Module, spec: PermutationSpec, inputs: Any, tol: float = 1e-4, seed: int = 0
) -> float:
    """
    Applies a random admissible permutation and compares the outputs.

    Args:
        model (`nn.Module`): a model; it runs in evaluation mode and is not changed.
        spec ([`PermutationSpec`]): what is to be checked.
        inputs (`Any`): one batch: a mapping is passed as keywords; of a tuple the first item is the input.
        tol (`float`, *optional*, defaults to 1e-4): largest difference, as a share of the largest output.
        seed (`int`, *optional*, defaults to 0): decides the permutation.

    Returns:
        `float`: the largest difference as a share of the largest output. Outputs that are no logits but hidden states are
        compared with their last axis sorted, for their units may change places.

    Raises:
        `ValueError`: if the specification does not fit the model's tensors, or the function changes.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.alignment import check_permutation_spec, mlp_spec

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> check_permutation_spec(model, mlp_spec(model), torch.randn(3, 4)) < 1e-5
    True
    ```
    """
    state = model.state_dict()
    check_models([state], spec)
    spec = spec.restricted(list(state))
    other = copy.deepcopy(model)
    other.load_state_dict(Permutation.random(spec, seed).apply(state))
    args, kwargs = model_inputs(inputs)
    with torch.no_grad(), evaluating(model, other):
        before, after = (_outputs(each(*args, **kwargs)) for each in (model, other))
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= tol:
        raise ValueError(
            f"A permutation that the specification admits changes the outputs by {error:.1e} of their size, more than "
            f"tol={tol:.0e}; some axis names the wrong group."
        )
    return error


def _outputs(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(output, Mapping) and "logits" not in output and hidden is not None:
        return hidden.double().sort(dim=1 if hidden.ndim == 4 else -1).values
    return logits_of(output).double()
