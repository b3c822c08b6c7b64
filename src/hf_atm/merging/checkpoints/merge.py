"""Merging checkpoints on disk, larger than memory: preflight, staged work, verification, and only then the final name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...hub import check_upload, push
from .alignment import align_inputs, alignment_facts, alignment_memory, check_inputs
from .costs import peak_memory
from .job import Job, check_disk, open_job
from .processes import Processes
from .recipe import MergeRecipe, read_recipe, with_align, with_dtype
from .record import write_record
from .run import Run, create_files, single_threaded
from .side_files import copy_side_files, set_config_dtype
from .staging import Journal, check_output, confirm_staging, open_staging, publish, staging_folder
from .verify import check_files, check_reload, same_structure


@dataclass(frozen=True)
class CheckpointMerge:
    """What a merge of checkpoints did, or, after a dry run, would do.

    Args:
        output_dir (`str`): the folder.
        method (`str`): the merge method.
        models (`list[str]`): names of the inputs.
        tensors (`int`): number of tensors in the result.
        parameters (`int`): number of entries in them.
        merged, copied (`int`): tensors that were merged, and taken over as they are.
        dtypes (`dict[str, int]`): entries by type.
        shapes (`dict[str, list[int]]`): shape of every tensor.
        files (`list[str]`): the weights' files.
        nbytes (`int`): their size.
        disk_bytes (`int`): what the merge needs on disk until it is done.
        peak_bytes (`int`): estimated peak of memory that is not backed by files, beside what the process held before.
        side_files (`list[str]`): files taken over beside the weights.
        left_out (`list[str]`): tensors of the models that the result does not have.
        notes (`list[str]`): what the user should know.
        resumed (`bool`): whether an interrupted merge was continued.
        reloaded_as (`str`): the class that loaded the result, or why none did.
        dry_run (`bool`): whether nothing was written.
        alignment (`dict`): method, objective before and after, and the units that moved, if the models were aligned.
    """

    output_dir: str
    method: str
    models: list[str]
    tensors: int
    parameters: int
    merged: int
    copied: int
    dtypes: dict[str, int]
    shapes: dict[str, list[int]]
    files: list[str]
    nbytes: int
    disk_bytes: int
    peak_bytes: int
    side_files: list[str]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed: bool = False
    reloaded_as: str = ""
    dry_run: bool = False
    alignment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def merge_checkpoints(
    config_or_yaml: str | os.PathLike | Mapping[str, Any] | MergeRecipe,
    output_dir: str | os.PathLike,
    max_shard_size: int | str = "5GB",
    out_dtype: str | torch.dtype | None = None,
    dry_run: bool = False,
    *,
    align: str | Mapping[str, Any] | None = None,
    device: str | None = None,
    threads: int | None = None,
    reload: bool | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    progress: bool = True,
) -> CheckpointMerge:
    """
    Merges checkpoints tensor by tensor, from safetensors files into safetensors files.

    Every tensor is read through the page cache, merged and written straight to its place, by several threads at once;
    no model ever lies in memory. The result equals [`merge_state_dicts`] on the loaded models, given the same names, bit
    by bit, whatever the number of threads or processes. Under `accelerate launch` (or torchrun) the tensors are shared
    out over all processes, which must see the same file system.

    The result is put together in `<output_dir>.incomplete` and renamed when it is whole and verified. After a kill the
    same call goes on where it stopped.

    Args:
        config_or_yaml (`str`, `PathLike`, mapping or [`MergeRecipe`]): the recipe, see [`read_recipe`].
        output_dir (`str` or `PathLike`): a folder that does not exist yet, or is empty.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): largest file of weights.
        out_dtype (`str` or `torch.dtype`, *optional*): type of the result; replaces the recipe's.
        dry_run (`bool`, *optional*, defaults to `False`): check everything, estimate memory and disk, write nothing.
        align (`str` or mapping, *optional*): replaces the recipe's.
        device (`str`, *optional*): where to compute, such as `"cuda"`; the CPU by default.
        threads (`int`, *optional*): workers; by default as many as this process has cores.
        reload (`bool`, *optional*): whether to load the result with transformers, without memory for its weights, and
            refuse it if names are missing or left over. By default only if its names or shapes differ from those of the
            base (or first model), whose configuration it has: otherwise it loads as that one does.
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier merge of this library in `output_dir`.
        push_to_hub (`str`, *optional*): Hub id to upload the finished folder to, in one commit.
        private (`bool`, *optional*, defaults to `True`): whether a repository that does not exist yet becomes private.
        progress (`bool`, *optional*, defaults to `True`): one progress bar, on terminals only.

    Returns:
        [`CheckpointMerge`]

    Raises:
        `KeyError`, `ValueError`, `FileNotFoundError`, `OSError`: before any work, for a wrong recipe, inputs that do not
            fit together, pickles, corrupt files, an output that holds something else, or too little disk; during it, for
            entries that are not finite. Nothing is left under the final name then.
        `RuntimeError`: if the written result fails its verification.

    Cost: one pass over all inputs (more for thresholds over the whole model); memory is what `dry_run` estimates, a few
    megabytes for linear methods whatever the size of the models. Alignment holds all models in memory, some twenty times over.
    """
    recipe = read_recipe(config_or_yaml)
    if out_dtype is not None:
        recipe = with_dtype(recipe, out_dtype)
    if align is not None:
        recipe = with_align(recipe, align)
    # A link is followed, so that the result is put together on the disk where it will lie.
    output = Path(output_dir).resolve()
    processes = Processes()
    workers = max(1, _cores() // processes.local_count) if threads is None else threads
    device = processes.place(device)
    _check_options(workers, device)
    if push_to_hub is not None and not dry_run:
        processes.on_main(check_upload, push_to_hub)
    job = open_job(recipe, max_shard_size, device)
    try:
        # One process looks, before it makes something that the others would find in the way.
        processes.on_main(check_output, output, overwrite, [reader.path for reader in job.readers])
        processes.on_main(check_disk, job, output)
        processes.on_main(job.merger.rehearse)
        if recipe.align and dry_run:
            processes.on_main(check_inputs, job)
        elif recipe.align:
            alignment = align_inputs(job, output, processes, device)
            job.close()
            job = open_job(recipe, max_shard_size, device, alignment)
        if dry_run:
            return _summary(job, output, workers, dry_run=True)
        resumed, reloaded = _carry_out(job, output, processes, workers, reload, progress)
    finally:
        job.close()
    if push_to_hub is not None and processes.is_main:
        push(output, push_to_hub, private)
    processes.wait()
    return _summary(job, output, workers, resumed=resumed, reloaded_as=reloaded)


def _check_options(threads: int, device: str | None) -> None:
    if threads < 1:
        raise ValueError(f"threads={threads} is too few; give at least one, or leave it out.")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device={device!r} is not available here ({reason}).") from error


def _carry_out(
    job: Job, output: Path, processes: Processes, workers: int, reload: bool | None, progress: bool
) -> tuple[bool, str]:
    # Whatever is wrong with what the method needs to know shows before anything is written.
    with single_threaded(workers, job.merger):
        job.merger.prepare()
    staging, resumed = staging_folder(output), False
    if processes.is_main:
        staging, resumed = open_staging(output, job.identity())
        if not resumed:
            create_files(job, staging)
            confirm_staging(staging)
    processes.wait()
    journal = Journal(staging, processes.rank)
    bar = _bar(job, processes, progress)
    run = Run(job, staging, journal, processes, workers, bar.update)
    error: BaseException | None = None
    try:
        run.run()
    except Exception as caught:
        error = caught
    finally:
        run.close()
        bar.close()
        journal.close()
    if isinstance(error, ValueError):
        # Wrong inputs stay wrong; there is nothing to go on with.
        shutil.rmtree(staging, ignore_errors=True)
    processes.agree(error)
    reloaded = ""
    if processes.is_main:
        reloaded = _finish(job, staging, output, reload)
    processes.wait()
    return resumed, reloaded


def _finish(job: Job, staging: Path, output: Path, reload: bool | None) -> str:
    for folder, names in job.side_files():
        copy_side_files(folder, staging, names)
    set_config_dtype(staging, job.layout.tensors.values())
    check_files(staging, job.layout)
    if reload is None:
        reload = not same_structure(job.layout, job.reference)
    reloaded = check_reload(staging, job.reference.path) if reload else "not reloaded: same structure as its reference"
    journal = Journal(staging, 0)
    write_record(job, staging, journal, reloaded)
    journal.close()
    publish(staging, output)
    return reloaded


def _summary(job: Job, output: Path, workers: int, **facts: Any) -> CheckpointMerge:
    tensors = job.layout.tensors
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    merged = sum(map(len, job.plan.groups.values()))
    peak = peak_memory(job.merger, workers)
    if job.recipe.align:
        aligning, reading = alignment_memory(job, workers)
        peak = max(aligning, peak + reading)
    return CheckpointMerge(
        output_dir=str(output),
        method=job.recipe.merge_method,
        models=[model.name for model in job.recipe.models],
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        merged=merged,
        copied=len(tensors) - merged,
        dtypes=dtypes,
        shapes={key: list(tensor.shape) for key, tensor in tensors.items()},
        files=sorted(job.layout.files),
        nbytes=job.layout.nbytes,
        disk_bytes=job.disk,
        peak_bytes=peak,
        side_files=[name for _, names in job.side_files() for name in names],
        left_out=job.plan.left_out,
        notes=job.notes,
        alignment=alignment_facts(job),
        **facts,
    )


def _bar(job: Job, processes: Processes, progress: bool) -> Any:
    from tqdm.auto import tqdm

    # None switches the bar off where the output is no terminal.
    hidden = None if progress and processes.is_main else True
    phases = 2 if job.merger.needs_norms else 1
    total = phases * sum(step.cost for step in job.steps) / processes.count
    form = "{l_bar}{bar}| {elapsed}<{remaining}"
    return tqdm(total=total, desc=f"Merging by {job.recipe.merge_method}", disable=hidden, bar_format=form)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
