"""Everything about a merge of checkpoints that headers alone can tell: opened, checked, laid out and costed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..buffers import merge_buffers
from ..engine import Merger
from ..plan import MergePlan, matches, plan_merge, with_tied_tables
from ..registry import get_merge_method
from ..state_dict import check_base_free, half_precision_note
from ..tying import tied_by_content
from .alignment import in_one_frame
from .costs import step_cost
from .layout import Layout, meta_tensors, plan_layout
from .reader import CheckpointReader, identify, is_adapter, resolve_model
from .recipe import DTYPES, MergeRecipe
from .side_files import list_side_files, tokenizer_files
from .staging import staging_folder


if TYPE_CHECKING:
    from ...alignment import Alignment

# Methods that mergekit does not normalise unless told to.
_SUMMED_ELSEWHERE = ("dare", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear")


@dataclass(frozen=True)
class Step:
    """A part of the work that stands alone: a group of merged tensors, or one tensor that is copied."""

    kind: str
    keys: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class Job:
    """A merge, ready to run.

    Args:
        recipe (`MergeRecipe`): what was asked for.
        merger (`Merger`): the arithmetic.
        readers (`list[CheckpointReader]`): the models, then the base if there is one.
        layout (`Layout`): the result's files.
        private (`dict[str, Layout]`): files of tensors kept per model.
        pooled (`dict[str, Tensor]`): merged buffers, which are small.
        steps (`list[Step]`): the work, in the order of the files.
        notes (`list[str]`): what the user should know.
        sources (`list[Mapping[str, Tensor]]`): `readers`, in one order of units where the models are aligned.
        alignment ([`Alignment`], *optional*): of the readers, where the models are aligned.
    """

    recipe: MergeRecipe
    merger: Merger
    readers: list[CheckpointReader]
    layout: Layout
    private: dict[str, Layout]
    pooled: dict[str, Tensor]
    steps: list[Step]
    notes: list[str]
    sources: list[Mapping[str, Tensor]]
    alignment: Alignment | None = None

    @property
    def plan(self) -> MergePlan:
        return self.merger.plan

    @property
    def reference(self) -> CheckpointReader:
        """The checkpoint whose names, shapes and side files the result has."""
        return self.readers[self.frame]

    @property
    def frame(self) -> int:
        """The reference's place among the readers; aligned models are read in the order of its units."""
        return len(self.readers) - 1 if self.recipe.base_model is not None else 0

    @property
    def disk(self) -> int:
        """Bytes the merge needs on disk until it is done."""
        weights = self.layout.nbytes + sum(layout.nbytes for layout in self.private.values())
        return weights + (scratch_size(self.merger) if has_scratch(self.merger) else 0)

    def side_files(self) -> list[tuple[Path, list[str]]]:
        """Folders, and the names of the files to copy from each, later ones replacing earlier ones."""
        reference = self.reference.path
        copied = [(reference, list_side_files(reference, self.recipe.copy_code)[0])]
        source = self.recipe.tokenizer_source
        for model, reader in zip(self.recipe.models, self.readers, strict=False):
            if source in (model.name, model.model):
                kept = set(tokenizer_files(reference))
                copied = [(reference, [name for name in copied[0][1] if name not in kept])]
                copied.append((reader.path, tokenizer_files(reader.path)))
        return copied

    def identity(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted merge to go on."""
        return {
            "recipe": self.recipe.digest,
            "inputs": [reader.identity() for reader in self.readers],
            "statistics": [identify(Path(model.statistics)) for model in self.recipe.models if model.statistics],
            "files": {
                file: digest_text(header.decode("utf-8", "replace"))
                for layout in (self.layout, *self.private.values())
                for file, header in layout.headers.items()
            },
            "torch": torch.__version__,
        }

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def open_job(
    recipe: MergeRecipe,
    max_shard_size: int | str = "5GB",
    device: str | None = None,
    alignment: Alignment | None = None,
) -> Job:
    """
    Opens and checks every input of a recipe, and lays the result out. Reads headers, and buffers.

    Args:
        recipe (`MergeRecipe`): what was asked for.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): largest file of weights.
        device (`str`, *optional*): where to compute.
        alignment ([`Alignment`], *optional*): of the models, then the base, if they are to be read in one order of units.

    Raises:
        `FileNotFoundError`, `ValueError`: for whatever would make the merge fail or lose something; one sentence each.
    """
    rule = get_merge_method(recipe.merge_method)
    kwargs = dict(recipe.parameters)
    scale = kwargs.pop("scaling_coefficient", 1.0)
    readers = [CheckpointReader(resolve_model(model.model, model.revision)) for model in recipe.models]
    base = None
    if recipe.base_model is not None:
        base = CheckpointReader(resolve_model(recipe.base_model, recipe.base_revision))
    else:
        check_base_free(rule, scale, recipe.buffers, recipe.postprocess)
    adapters = [
        str(reader.path) for reader in (*readers, *([base] if base is not None else [])) if is_adapter(reader.path)
    ]
    if adapters or recipe.adapters:
        what = f"{adapters[0]!r} is an adapter" if adapters else "recipe key 'adapters' is for adapters"
        raise ValueError(f"{what}, and factors must not be averaged on their own; use merge_adapters or hf-atm merge.")
    private = _private_layouts(recipe, readers)
    inputs = [*readers, base] if base is not None else list(readers)
    reference = base if base is not None else readers[0]
    copies = tied_by_content(inputs, _ties_embeddings(reference))
    # Where some files store a tied tensor twice and others once, the second copy goes; where all do, both are written.
    dropped = [copy for copy in copies if not all(copy in reader for reader in inputs)]
    views: list[Mapping[str, Tensor]] = [_Without(reader, dropped) if dropped else reader for reader in inputs]
    # The reference stays as it is, and so do shapes; a plan that is made of files alone holds.
    aligned = in_one_frame(views, alignment, len(views) - 1 if base is not None else 0)
    dtype = DTYPES[recipe.out_dtype] if recipe.out_dtype else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_merge(
            views[: len(readers)],
            views[-1] if base is not None else None,
            exclude=[*recipe.exclude, *recipe.task_specific_modules],
            strict=recipe.strict,
            buffers=recipe.buffers,
            vocab_policy=recipe.vocab_policy,
            dtype=dtype,
            tied=copies,
            way_out="name them in exclude to take them from the base, or in task_specific_modules to keep each model's own",
        )
    names = [model.name for model in recipe.models]
    weights = [model.weight for model in recipe.models]
    if "statistics" in rule.parameters:
        kwargs["statistics"] = [model.statistics for model in recipe.models]
    merger = Merger(
        plan,
        aligned[: len(readers)],
        aligned[-1] if base is not None else None,
        rule,
        weights,
        names,
        with_tied_tables(rule, kwargs, plan.groups),
        scale,
        recipe.postprocess,
        torch.device(device) if device is not None else None,
    )
    pooled = merge_buffers(
        [{key: view[key] for key in plan.pooled} for view in aligned[: len(readers)]],
        {key: plan.reference[key] for key in plan.pooled},
        weights,
    )
    notes = [str(warning.message) for warning in caught]
    if dropped:
        notes.append(f"Stored once, as they are tied to others: {', '.join(sorted(dropped))}.")
    if rule.requires_base and (note := half_precision_note(readers, plan.leaders)):
        notes.append(note)
    prototypes = sorted(name for name in plan.reference if name.endswith(".prototypes"))
    if prototypes:
        notes.append(
            f"Prototypes are merged as numbers, and are not those of the merged weights ({', '.join(prototypes)}): load the "
            "model, call hf_atm.refresh_prototypes with the task's data, and save it."
        )
    notes += _surprises(recipe, rule.name, inputs)
    code = list_side_files(reference.path)[1] if not recipe.copy_code else []
    if code:
        notes.append(f"Python files stay behind (copy_code: true takes them along): {', '.join(code)}.")
    layout = plan_layout(meta_tensors(_entries(plan, dtype)), max_shard_size)
    left_out = [key for key in plan.left_out if not matches(key, recipe.task_specific_modules)]
    if left_out:
        notes.append(f"Tensors that the result does not have: {', '.join(left_out)}.")
    steps = _steps(merger, layout, private)
    sources = in_one_frame(inputs, alignment, len(inputs) - 1 if base is not None else 0)
    return Job(recipe, merger, inputs, layout, private, pooled, steps, notes, sources, alignment)


def check_disk(job: Job, output: Path) -> None:
    """
    Raises:
        `OSError`: if the disk has less room than the merge needs.
    """
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    # What an interrupted merge has written is counted once.
    staging = staging_folder(output)
    there = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in staging.rglob("*")) if staging.is_dir() else 0
    free = shutil.disk_usage(folder).free + there
    if free < job.disk:
        raise OSError(
            f"The merge needs {job.disk / 1e9:.2f} GB at {str(output)!r} and {free / 1e9:.2f} GB are free; make room or "
            "name another output."
        )


def has_scratch(merger: Merger) -> bool:
    """Whether merged task vectors wait on disk until their scale is known; plain sums are computed again instead."""
    return merger.needs_norms and not merger.fused


def scratch_size(merger: Merger) -> int:
    """Bytes of the file that holds merged task vectors until their scale is known."""
    return sum(offset_step(merger, key) for key in merger.plan.leaders)


def offset_step(merger: Merger, key: str) -> int:
    """Bytes that a task vector takes in the scratch file, a multiple of eight."""
    nbytes = merger.views[0].shape(key).numel() * merger.plan.dtypes[key].itemsize
    return nbytes + -nbytes % 8


def digest_text(text: str) -> str:
    """A short fingerprint of a text."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


class _Without(Mapping[str, Tensor]):
    """A checkpoint without some of its tensors."""

    def __init__(self, reader: CheckpointReader, left: Sequence[str]) -> None:
        self.reader = reader
        self.keys_ = {key: None for key in reader if key not in left}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.keys_:
            raise KeyError(key)
        return self.reader[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _ties_embeddings(reference: CheckpointReader) -> bool:
    """Whether the result's configuration says that head and embeddings are one tensor (the default where it is silent)."""
    path = os.path.join(reference.path, "config.json")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file).get("tie_word_embeddings", True) is not False
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no configuration ({error}); fetch or write it again.") from error


def _entries(plan: MergePlan, dtype: torch.dtype | None) -> list[tuple[str, torch.Size, torch.dtype]]:
    leader_of = plan.leader_of
    entries = []
    for key, tensor in plan.reference.items():
        stored = plan.out_dtypes[leader_of[key]] if key in leader_of else tensor.dtype
        if key not in leader_of and dtype is not None and tensor.is_floating_point():
            stored = dtype
        entries.append((key, tensor.shape, stored))
    return entries


def _surprises(recipe: MergeRecipe, method: str, inputs: Sequence[CheckpointReader]) -> list[str]:
    """What a recipe might mean otherwise than its author."""
    notes = []
    idle = [
        pattern for pattern in recipe.exclude if not any(matches(key, [pattern]) for part in inputs for key in part)
    ]
    if idle:
        notes.append(f"exclude has patterns that no tensor matches: {', '.join(idle)}.")
    if method in _SUMMED_ELSEWHERE and not {"normalize", "merge_func"} & set(recipe.parameters):
        notes.append(f"{method} gives a mean here and a sum in mergekit; normalize: false gives the sum.")
    return notes


def _private_layouts(recipe: MergeRecipe, readers: Sequence[CheckpointReader]) -> dict[str, Layout]:
    layouts = {}
    for model, reader in zip(recipe.models, readers, strict=True):
        keys = [key for key in reader if matches(key, recipe.task_specific_modules)]
        if recipe.task_specific_modules and not keys:
            raise ValueError(
                f"Model {model.name!r} has no tensor that matches task_specific_modules="
                f"{recipe.task_specific_modules}; correct the patterns."
            )
        if keys:
            tensors = meta_tensors((key, reader[key].shape, reader[key].dtype) for key in keys)
            name = model.name.replace("/", "--")
            layouts[model.name] = plan_layout(tensors, 1 << 62, name=f"{name}.safetensors")
    return layouts


def _steps(merger: Merger, layout: Layout, private: Mapping[str, Layout]) -> list[Step]:
    plan = merger.plan
    position = {key: place for place, key in enumerate(key for keys in layout.files.values() for key in keys)}
    merged = [Step("merge", tuple(part), step_cost(merger, part)) for part in merger.parts]
    leader_of = plan.leader_of
    copied = [
        Step("copy", (key,), tensor.numel() * tensor.itemsize)
        for key, tensor in layout.tensors.items()
        if key not in leader_of
    ]
    steps = sorted([*merged, *copied], key=lambda step: position[step.keys[0]])
    kept = [Step(f"private:{name}", tuple(part.tensors), float(part.nbytes)) for name, part in private.items()]
    return [*steps, *kept]
