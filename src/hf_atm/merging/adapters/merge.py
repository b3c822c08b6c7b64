"""Merging LoRA adapters exactly in the updates they stand for, without their base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..task_vectors import resolve_scale
from ..tensors import check_weights
from .compatibility import check_compatible
from .configs import config_with_head, merged_config
from .folder import check_folder
from .modules import Layout
from .outputs import Written, check_rank, write_updates
from .parsing import DTYPES
from .reading import Adapter, read_adapters
from .result import AdapterMerge
from .saved import SavedModules, merge_saved
from .updates import Merge, check_space, merged_updates


def merge_adapters(
    adapters: Any,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    output: str = "cat",
    svd_rank: int | None = None,
    *,
    space: str = "core",
    scaling_coefficient: float | str = 1.0,
    heads: str = "error",
    strict: bool = True,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    **method_kwargs: Any,
) -> AdapterMerge:
    """
    Merges LoRA adapters of one base model, which is not needed.

    What is merged are the true updates `D_t = s_t B_t A_t`, with s_t alpha / rank or alpha / sqrt(rank) (rsLoRA) by
    module, never factors on their own: `D = lambda * merge({D_t})`. The result depends neither on the order of the
    adapters nor on how an update is split into factors ((A, B) -> (G A, B G^-1)).

    Linear methods are exact. The others work in core space (https://huggingface.co/papers/2509.17786): `D_t = U M_t V.T`
    with the small cores `M_t` merged in place of the matrices. For methods that only use norms, angles and singular
    vectors (`tsv_m`, `iso_c`, ...) that is the same as merging the matrices, at a fraction of the cost, except that
    spectra are never spread beyond the updates' span, and that `iso_cts` takes its shares of directions from the core's.
    Elementwise methods (`ties`, `dare`, ...) see entries of the cores and so depend on the bases: those of the singular vectors of the stacked updates, see [`CoreSpace`]. Embeddings and
    other tensors that a spectral method leaves to the mean are left to it here too; kernels of convolutions count as
    matrices `(out, in * kernel)`.

    Args:
        adapters (`Sequence` or `PeftModel`):
            T adapters: PEFT folders, Hub ids, `(LoraConfig, state_dict)` pairs, `(PeftModel, adapter_name)` pairs or
            `PeftModel`s with one adapter; or one `PeftModel`, whose adapters (those in `names`) are merged. Only
            safetensors are read.
        method (`str`, *optional*, defaults to `"mean"`):
            A name of [`list_merge_methods`].
        weights (`Sequence[float]`, *optional*):
            T weights, ones by default, as in [`merge_task_vectors`]; zero and negative ones are allowed.
        output (`str`, *optional*, defaults to `"cat"`):
            - `"cat"`: an exact adapter. Linear methods put the factors side by side, so ranks add up; other methods give
              factors of the numerical rank of their result.
            - `"svd"`: the best adapter of rank `svd_rank`; `report["lost_energy"]` says what it misses.
            - `"delta"`: dense updates by weight name.
            - `"residual"`: an adapter of mean factors, and dense updates with what it lacks, so that both together are
              exact (FedEx-LoRA, https://huggingface.co/papers/2410.09432).
        svd_rank (`int`, *optional*):
            Rank for `"svd"`, from 1 to the exact rank of the merge; where a module's exact rank is lower, that one.
            Defaults, for each module, to the largest rank that an adapter has there.
        space (`str`, *optional*, defaults to `"core"`):
            Where non-linear methods work: `"core"`; `"full"`, on the dense matrices, at their cost in time and T times
            their memory; or `"knots"` (https://huggingface.co/papers/2410.19735), on the right singular vectors
            `V_t` of `[D_1 ... D_T] = U S [V_1.T ... V_T.T]`, for elementwise methods. In `"core"` and `"knots"`
            `min_sparse_numel` is 0 unless given.
        scaling_coefficient (`float` or `str`, *optional*, defaults to 1.0):
            Factor lambda on the merged update; `"norm"` chooses it without data, see [`norm_scale`].
        heads (`str`, *optional*, defaults to `"error"`):
            What becomes of task heads (saved modules called `classifier`, `score`, `qa_outputs`, `head`, ..., or whose
            shapes differ) that are not the same in all adapters: `"error"`; `"separate"`, each kept beside the merged
            adapter; `"merge"`, averaged; or the name of the adapter whose head is taken. A head that only one adapter
            has is kept. Other saved tensors (`modules_to_save`, trained biases) take the weighted mean, whatever the
            method, because a full weight without its base is no task vector.
        strict (`bool`, *optional*, defaults to `True`):
            Whether differing base model names, and modules that only some adapters have, are errors. With `False` they
            are warnings, and an adapter has a zero update where it lacks a module.
        names (`Sequence[str]`, *optional*):
            T different task names, which fix the order of summation and random masks. Default to folder and adapter
            names where these differ, else to hashes of the contents.
        dtype (`torch.dtype`, *optional*):
            Floating type of the result; float32 by default (float64 for float64 inputs), also for half-precision
            inputs, whose merged update half precision would not hold.
        **method_kwargs:
            The method's own keywords, such as `density`.

    Returns:
        `AdapterMerge`: factors or dense updates at the method's scale, with alpha equal to the rank; see there.

    Raises:
        `KeyError`: if the method is unknown.
        `ValueError`: before any work, for wrong keywords, weights or names; unreadable, pickled or non-finite inputs; adapters that are not plain LoRA (DoRA, `lora_bias`, KaSA, PiSSA, IA3, ...); shapes, base models or
            modules that differ; undecided heads.

    Cost: per `(m, n)` module two QR decompositions of `(m, R)` and `(n, R)`, R the sum of the ranks, and the method on
    `(R, R)`; float64.

    Example:

    ```python
    >>> import torch
    >>> from peft import LoraConfig
    >>> from hf_atm.merging import merge_adapters

    >>> config = LoraConfig(r=1, lora_alpha=1, target_modules=["q"])
    >>> def adapter(value):
    ...     a, b = torch.full((1, 3), value), torch.ones(2, 1)
    ...     return config, {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    >>> merged = merge_adapters([adapter(1.0), adapter(3.0)], output="delta")
    >>> merged.deltas["q.weight"]
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    ```
    """
    kwargs, scale = resolve_scale(method, method_kwargs, scaling_coefficient)
    check_space(method, space, kwargs)
    check_rank(svd_rank, output)
    _check_dtype(dtype)
    found = read_adapters(adapters, names)
    given = check_weights(weights, len(found))
    order = sorted(range(len(found)), key=lambda index: found[index].name)
    ordered, values = [found[index] for index in order], [given[index] for index in order]
    layouts = check_compatible(ordered, strict)
    saved = merge_saved(ordered, values, heads, strict, dtype)

    widest = _widest(ordered)
    merged, factor = merged_updates(Merge(found, given, layouts, method, space, kwargs), scale, widest)
    written = write_updates(output, svd_rank, merged, ordered, values, layouts, dtype or widest)
    factors = _stored(written, layouts, dtype or widest)
    config, head_configs = _configs(written, ordered, layouts, saved)
    report = {
        "inputs": [
            {"name": adapter.name, "source": adapter.label, "sha256": adapter.digest, "weight": weight}
            for adapter, weight in zip(ordered, values, strict=True)
        ],
        "method": method,
        "parameters": dict(sorted(kwargs.items())),
        "scaling_coefficient": factor,
        "space": space,
        "output": output,
        **written.report(),
        "saved": saved.fate,
    }
    return AdapterMerge(config, factors, written.deltas, saved.shared, saved.separate, head_configs, report)


def merge_adapter_folders(
    folders: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    method: str = "mean",
    **kwargs: Any,
) -> AdapterMerge:
    """
    Merges adapter folders into a folder.

    Args:
        folders (`Sequence[str]`):
            T PEFT folders or Hub ids.
        output_dir (`str`):
            Must not exist, be empty, or hold an earlier result, which is replaced; looked at before any work.
        names, weights, method, **kwargs:
            As in [`merge_adapters`].

    Returns:
        `AdapterMerge`: what was written, see [`AdapterMerge.save_pretrained`].

    Raises:
        `ValueError`: as [`merge_adapters`], and for an output folder that holds something else.
    """
    check_folder(output_dir)
    result = merge_adapters(list(folders), method, weights, names=names, **kwargs)
    result.save_pretrained(output_dir)
    return result


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(str, DTYPES))}.")


def _widest(adapters: Sequence[Adapter]) -> torch.dtype:
    """Float64 if some factor is, else float32."""
    factors = (
        factor for adapter in adapters for module in adapter.modules.values() for factor in (module.a, module.b)
    )
    return torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32


def _configs(
    written: Written, adapters: Sequence[Adapter], layouts: Mapping[str, Layout], saved: SavedModules
) -> tuple[Any, dict[str, Any]]:
    """Configuration of the merged adapter, if there is one, and of the same with each task's own head."""
    if not written.factors:
        return None, {}
    ranks = {module: update.rank for module, update in written.factors.items()}
    config = merged_config(adapters, ranks, layouts, saved.shared, separate=bool(saved.separate))
    heads = {
        adapter.name: config_with_head(config, adapter, {**saved.shared, **saved.separate[adapter.name]})
        for adapter in adapters
        if adapter.name in saved.separate
    }
    return config, heads


def _stored(written: Written, layouts: Mapping[str, Layout], dtype: torch.dtype) -> dict[str, Tensor]:
    factors: dict[str, Tensor] = {}
    for module, update in written.factors.items():
        factors.update(layouts[module].store(module, update, dtype))
    for key, tensor in factors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"The merged factor {key!r} overflows {dtype}; pass a wider dtype.")
    return factors
