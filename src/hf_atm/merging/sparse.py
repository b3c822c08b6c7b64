"""Elementwise merges that drop entries first: TIES, DARE, DARE-TIES and Breadcrumbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .elect import disjoint_merge, elect_signs, settle_draws
from .linear import linear_coefficients
from .masks import kept_count, random_mask, top_mask
from .registry import register_merge_method
from .tensors import Task, canonical_tasks, result_dtype, sorted_keys, weighted_sum


# Biases, norms and scalars are too small for a density to mean anything.
MIN_SPARSE_NUMEL = 100


@register_merge_method("dare", "dare_linear", family="elementwise", per_tensor=True)
def dare(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float,
    seed: int = 0,
    rescale: bool = True,
    normalize: bool = True,
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    DARE: drop entries at random, rescale the rest, average (https://huggingface.co/papers/2311.03099).

    `sum_t w_t m_t tau_t / (density * sum_t w_t)` with `m_t ~ Bernoulli(density)`: its expectation over seeds is the
    mean, and `density=1` is the mean. The paper's drop rate is `1 - density`.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; with the seed and the tensor name they decide the masks.
        density (`float`):
            Fraction kept, in (0, 1]; .1 and .5 are usual. There is no default.
        seed (`int`, *optional*, defaults to 0):
            Decides all masks, which do not depend on process, device, input order or hash seed.
        rescale (`bool`, *optional*, defaults to `True`):
            Whether kept entries are divided by `density`.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide by the sum of the weights; `False` gives DARE with task arithmetic.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries skip the mask.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean, unless
        `normalize=False`.

    Raises:
        `ValueError`: if the weights sum to zero and `normalize=True`.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    keys, small = _split_small(tasks, min_sparse_numel)
    merged = _plain_merge(tasks, small, normalize)
    coefficients = linear_coefficients("mean", [task.weight for task in tasks], normalize=normalize)
    factor = density if rescale else 1.0
    scaled = [coefficient / factor for coefficient in coefficients]
    for key in keys:
        merged[key] = weighted_sum((_dropped(task, key, density, seed) for task in tasks), scaled)
    return {key: merged[key] for key in sorted(merged)}


@register_merge_method("dare_ties", family="elementwise", per_tensor=True)
def dare_ties(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float,
    seed: int = 0,
    rescale: bool = True,
    majority_sign_method: str = "total",
    weighted_vote: bool = False,
    merge_func: str = "mean",
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    DARE-TIES: entries dropped at random as in [`dare`], then sign election and disjoint merge as in [`ties`].

    See https://huggingface.co/papers/2311.03099. Draws of the vote take the majority sign of their tensor.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights of the values; a task of weight zero takes no part.
        names (`Sequence[str]`):
            T different task names; with the seed and the tensor name they decide the masks.
        density (`float`):
            Fraction kept, in (0, 1]. There is no default.
        seed (`int`, *optional*, defaults to 0):
            Decides all masks.
        rescale (`bool`, *optional*, defaults to `True`):
            Whether kept entries are divided by `density`.
        majority_sign_method (`str`, *optional*, defaults to `"total"`):
            `"total"` or `"frequency"`.
        weighted_vote (`bool`, *optional*, defaults to `False`):
            Whether the votes are weighted as the values are.
        merge_func (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"max"`.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries take the plain mean (the plain sum if `merge_func="sum"`).

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs).
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    values = [task.weight for task in tasks]
    keys, small = _split_small(tasks, min_sparse_numel)
    merged = _plain_merge(tasks, small, normalize=merge_func != "sum")
    for key in keys:
        kept = [_full_precision(_dropped(task, key, density, seed)) for task in tasks]
        if rescale:
            kept = [tensor / density for tensor in kept]
        signs = elect_signs(kept, values, majority_sign_method, weighted_vote)
        signs = settle_draws(signs, int(signs.sum(dtype=torch.int64)))
        merged[key] = disjoint_merge(kept, values, signs, merge_func)
    return {key: merged[key] for key in sorted(merged)}


@register_merge_method("breadcrumbs", family="elementwise", per_tensor=True)
def breadcrumbs(
    task_vectors: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    density: float = 0.143,
    gamma: float = 0.007,
    normalize: bool = True,
    min_sparse_numel: int = MIN_SPARSE_NUMEL,
) -> dict[str, Tensor]:
    """
    Breadcrumbs: drop outliers and small entries of every tensor (https://huggingface.co/papers/2312.06795).

    Of n entries ordered by magnitude the top `floor(gamma * n)` are dropped, the next `max(1, floor(density * n))`
    are kept, the rest is dropped. Deviation: the paper sums the masked task vectors and tunes a scale; here the
    default is their mean, which is safe at scale one inside ATM. Small tensors take the mean.

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T weights.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        density (`float`, *optional*, defaults to 0.143):
            Fraction kept, in (0, 1], with `gamma + density <= 1`.
        gamma (`float`, *optional*, defaults to 0.007):
            Share of largest entries dropped, in [0, 1).
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to divide by the sum of the weights; `False` is the paper's sum.
        min_sparse_numel (`int`, *optional*, defaults to 100):
            Tensors with fewer entries skip the mask.

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: like a mean, unless
        `normalize=False`.

    Raises:
        `ValueError`: if the weights sum to zero and `normalize=True`.
    """
    tasks = canonical_tasks(task_vectors, weights, names)
    keys, small = _split_small(tasks, min_sparse_numel)
    merged = _plain_merge(tasks, small, normalize)
    coefficients = linear_coefficients("mean", [task.weight for task in tasks], normalize=normalize)

    def crumbs(task: Task, key: str) -> Tensor:
        tensor = _full_precision(task.tensors[key])
        dropped = min(kept_count(gamma, tensor.numel()), tensor.numel() - 1)
        kept = max(1, kept_count(density, tensor.numel()))
        # Equal magnitudes are ordered by index in both masks, so the smaller set lies inside the larger one.
        mask = top_mask(tensor, dropped + kept) & ~top_mask(tensor, dropped)
        return tensor.masked_fill(~mask, 0)

    for key in keys:
        merged[key] = weighted_sum((crumbs(task, key) for task in tasks), coefficients)
    return {key: merged[key] for key in sorted(merged)}


def _split_small(tasks: Sequence[Task], min_sparse_numel: int) -> tuple[list[str], list[str]]:
    """Tensor names that get masks, and those too small for them (empty tensors always are)."""
    keys = sorted_keys(tasks)
    numels = {key: tasks[0].tensors[key].numel() for key in keys}
    limit = max(1, min_sparse_numel)
    return [key for key in keys if numels[key] >= limit], [key for key in keys if numels[key] < limit]


def _plain_merge(tasks: Sequence[Task], keys: Sequence[str], normalize: bool) -> dict[str, Tensor]:
    """The linear merge in the method's own scale, for tensors without masks."""
    if not keys:
        return {}
    coefficients = linear_coefficients("mean", [task.weight for task in tasks], normalize=normalize)
    return {key: weighted_sum((task.tensors[key] for task in tasks), coefficients) for key in keys}


def _full_precision(tensor: Tensor) -> Tensor:
    """Float32 or float64 without gradient history; half types convert exactly."""
    return tensor.detach().to(result_dtype(tensor.dtype))


def _dropped(task: Task, key: str, density: float, seed: int) -> Tensor:
    """One tensor of one task with a random share of its entries set to zero."""
    tensor = task.tensors[key].detach()
    if density >= 1:
        return tensor
    mask = random_mask(tensor.shape, density, seed, key, task.name).to(tensor.device)
    return tensor.masked_fill(~mask, 0)
