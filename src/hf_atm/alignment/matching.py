"""`align`: models from different initialisations, brought into one frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..merging.tensors import content_names
from .ascent import git_rebasin, merge_many
from .features import feature_problem
from .inputs import check_models, read_models, with_heads
from .permutation import Permutation
from .problem import build_problem, objective
from .registry import spec_for
from .result import Alignment
from .runs import best_run
from .spec import PermutationSpec
from .starts import STARTS
from .workers import workers


METHODS = ("c2m3", "git-rebasin", "merge-many", "activations")

_DEFAULT_STARTS = ("identity", "barycentre", "barycentre", "gauge")


def align(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec | None = None,
    method: str = "c2m3",
    data: Any = None,
    *,
    starts: Sequence[str] = _DEFAULT_STARTS,
    max_iter: int = 200,
    tol: float = 1e-6,
    polish: int = 10,
    heads: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    keep_soft_maps: bool = False,
) -> Alignment:
    """
    Finds the order of every model's units in which the models agree best.

    `"c2m3"` (arXiv 2405.17897) maximises the sum over all pairs of models of the inner products of their weights, all
    models and groups at once, by Frank-Wolfe with an exact line search and a polish by assignments. Maps go through a
    common universe, so around a cycle of models they compose to the identity. Cost per iteration is linear in the number
    of models: two matrix products per tensor and one assignment per group.

    The result does not depend on the order of the models or the number of threads.

    Args:
        models (`Sequence[nn.Module | Mapping[str, Tensor]]`):
            At least two models of one architecture, floating point. They are not changed.
        spec ([`PermutationSpec`], *optional*):
            Which units may change places. By default that of the models' family, see [`spec_for`].
        method (`str`, *optional*, defaults to `"c2m3"`):
            Or `"activations"`, the same on activations in place of weights, which needs `data`; `"git-rebasin"`, all
            models onto one; `"merge-many"`, every model onto the mean of the others in turn (both arXiv 2209.04836).
        data (`Iterable`, *optional*):
            For `"activations"`: batches of a DataLoader, or per model a mapping from an axis such as `"M.0"` or
            `"A.0:q"` to features of shape (samples, units).
        starts (`Sequence[str]`, *optional*):
            Where Frank-Wolfe starts from, one run each: `"identity"`, `"barycentre"`, `"gauge"`, `"anchored"`. Where
            the runs differ, further ones start from the mean of what they found. The run with the largest objective after
            rounding and polish is kept. Models whose own order is stationary, as after tuning from one base, keep it.
        max_iter (`int`, *optional*, defaults to 200):
            Iterations of a run at most; for the other methods sweeps.
        tol (`float`, *optional*, defaults to 1e-6):
            A run ends when the Frank-Wolfe gap or the gain of a step falls below this share of the objective, and at the
            latest when a step gains .3% of the way up: from there the polish gains more in less time.
        polish (`int`, *optional*, defaults to 10):
            Sweeps of coordinate ascent after rounding at most.
        heads (`Sequence[str]`, *optional*):
            Patterns of tensors that are mapped but not matched, in place of the specification's own. Task heads are;
            `[]` matches them too, for models of one task.
        device (`str` or `torch.device`, *optional*):
            Where matrix products run; by default where the models are. Assignments run on the CPU.
        seed (`int`, *optional*, defaults to 0):
            Decides random starts and random orders.
        keep_soft_maps (`bool`, *optional*, defaults to `False`):
            Whether to keep the doubly stochastic matrices of the run before rounding.

    Returns:
        [`Alignment`]: `state_dicts` are the models in one frame, ready for [`merge_state_dicts`].

    Raises:
        `KeyError`: for a family without specification.
        `ValueError`: before any work, for models that cannot be aligned and arguments out of range; see the message.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.alignment import align, mlp_spec

    >>> def network():
    ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> models = [network(), network()]
    >>> align(models, mlp_spec(models[0])).map(0, 0).is_identity
    True
    ```
    """
    place = check_device(device)
    _check_arguments(method, starts, max_iter, tol, polish)
    models = list(models) if not isinstance(models, (Mapping, nn.Module)) else models
    states = read_models(models)
    spec = with_heads(spec or _spec_of(models), heads, states)
    names = check_models(states, spec)
    if not names:
        raise ValueError("No tensor is left to match; every one of them counts as a head or has no permuted axis.")
    spec = spec.restricted([name for state in states for name in state])
    labels = content_names(states, [1.0] * len(states), names)
    order = sorted(range(len(states)), key=lambda index: labels[index])
    with workers() as pool, torch.no_grad():
        if method == "activations":
            problem = feature_problem(models, spec, data, order, place)
        else:
            problem = build_problem(spec, [states[index] for index in order], names, place)
        if method in ("git-rebasin", "merge-many"):
            match = git_rebasin if method == "git-rebasin" else merge_many
            vectors, history = match(problem, pool, seed, max_iter)
            report: dict[str, Any] = {}
            soft: list[dict[str, np.ndarray]] = []
        else:
            run, reached = best_run(problem, pool, starts, max_iter, tol, polish, seed)
            vectors, history = run.vectors, run.values
            report = {"start": run.start, "iterations": run.iterations, "gap": run.gap, "converged": run.converged}
            report["starts"] = [{"start": start, "objective": value} for start, value in reached]
            soft = run.point.soft_maps(vectors[0]) if keep_soft_maps else []
        value = objective(problem, vectors)
    found = _in_one_frame(spec, vectors)
    position = {index: rank for rank, index in enumerate(order)}
    permutations = [found[position[index]] for index in range(len(states))]
    return Alignment(
        spec=spec,
        permutations=permutations,
        method=method,
        objective=value,
        history=history,
        report={"reference": order[0], **report},
        state_dicts=[mine.inverse().apply(state) for mine, state in zip(permutations, states, strict=True)],
        soft_maps=[soft[position[index]] for index in range(len(states))] if soft else [],
    )


def check_device(device: str | torch.device | None) -> torch.device | None:
    """The device, if there is one of that name here.

    Raises:
        `ValueError`: if there is not.
    """
    if device is None:
        return None
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}); choose 'cpu'.") from error


def _in_one_frame(spec: PermutationSpec, vectors: Sequence[Mapping[str, np.ndarray]]) -> list[Permutation]:
    """Orders of all groups, the first model's as the universe; groups that nothing was matched by stay in place."""
    identity = Permutation.identity(spec).vectors
    found = [Permutation(spec, {**identity, **mine}) for mine in vectors]
    back = found[0].inverse()
    return [mine.compose(back) for mine in found]


def _spec_of(models: Sequence[Any]) -> PermutationSpec:
    for model in models:
        if isinstance(model, nn.Module):
            return spec_for(model)
    raise ValueError(
        "State dicts do not tell their family; pass spec=, such as spec_for(config), mlp_spec(state_dict) or "
        "resnet_spec(state_dict)."
    )


def _check_arguments(method: str, starts: Sequence[str], max_iter: int, tol: float, polish: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    unknown = [start for start in starts if start not in STARTS]
    if isinstance(starts, str) or unknown or not starts:
        raise ValueError(f"starts={starts!r} must list at least one of {', '.join(STARTS)}.")
    if max_iter < 1 or polish < 0 or not tol >= 0:
        raise ValueError(
            f"max_iter={max_iter}, polish={polish}, tol={tol}: give at least one iteration, no negative number of "
            "sweeps, and a tolerance of at least 0."
        )
