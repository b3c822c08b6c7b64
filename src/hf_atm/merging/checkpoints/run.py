"""Carrying a job out: threads that read, compute and write at once, each tensor straight to its place on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..engine import Merger, flat
from ..tensors import CHUNK, converted
from .alignment import MAPS_NAME
from .job import Job, Step, has_scratch, offset_step, scratch_size
from .layout import Layout, Place, bytes_of, write_at
from .processes import Processes, share_out
from .staging import SCRATCH_NAME, Journal, digest_region


PRIVATE_FOLDER = "task_specific"

Progress = Callable[[float], None]

# Average cost of a step, in entries read, below which one thread is faster than several.
_SMALL = 1 << 17


class Run:
    """One process's share of a merge.

    Args:
        job (`Job`): the merge.
        staging (`Path`): where its files are.
        journal (`Journal`): what is done already.
        processes (`Processes`): who else works on it.
        threads (`int`): workers, each with one thread of its own for linear algebra.
        progress (`Callable`): told the cost of every finished step.
    """

    def __init__(
        self, job: Job, staging: Path, journal: Journal, processes: Processes, threads: int, progress: Progress
    ) -> None:
        self.job, self.staging, self.journal, self.processes = job, staging, journal, processes
        self.threads, self.progress = threads, progress
        files = [*job.layout.files, *((SCRATCH_NAME,) if has_scratch(job.merger) else ())]
        kept = [f"{PRIVATE_FOLDER}/{file}" for layout in job.private.values() for file in layout.files]
        self._descriptors = {
            name: os.open(staging / name, os.O_RDWR | getattr(os, "O_BINARY", 0)) for name in [*files, *kept]
        }
        self._offsets: dict[str, int] = {}

    def run(self) -> None:
        """Does this process's steps; waits for the others only where a factor depends on the whole model."""
        merger = self.job.merger
        with single_threaded(self.threads, merger):
            mine = [self.job.steps[index] for index in self._share()]
            if merger.needs_norms:
                self._open_scratch()
                self._all("vectors", [step for step in mine if step.kind == "merge"], self._vectors)
                found = {
                    key: entry["norms"] for (phase, key), entry in self.journal.entries.items() if phase == "vectors"
                }
                merger.settle(
                    {key: norms for part in self.processes.union(found).values() for key, norms in part.items()}
                )
            self._all("write", mine, self._write)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _share(self) -> list[int]:
        steps = self.job.steps
        costs = [step.cost for step in steps]
        return share_out([step.keys for step in steps], costs, self.processes.count)[self.processes.rank]

    def _all(self, phase: str, steps: Sequence[Step], work: Callable[[Step], dict[str, Any]]) -> None:
        """Runs all steps that the journal does not hold yet, and notes each when it is done."""
        waiting = []
        for step in steps:
            if self._is_done(phase, step):
                self.progress(step.cost)
            else:
                waiting.append(step)
        # The dearest first, so that no thread is left alone with one of them at the end.
        waiting.sort(key=lambda step: -step.cost)
        # Around small tensors there is more interpreter than arithmetic, and the interpreter knows one thread at a time.
        small = sum(step.cost for step in waiting) < _SMALL * len(waiting)
        with ThreadPoolExecutor(
            1 if small else self.threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            futures: dict[Future, Step] = {}
            for index, step in enumerate(waiting):
                ahead = waiting[index + self.threads : index + self.threads + 1]
                futures[pool.submit(self._with_prefetch, work, step, ahead)] = step
            pending = set(futures)
            try:
                while pending:
                    done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
                    for future in sorted(done, key=lambda future: futures[future].keys):
                        step = futures[future]
                        self.journal.add(phase, _label(step), **future.result())
                        self.progress(step.cost)
            except BaseException:
                for future in pending:
                    future.cancel()
                raise

    def _with_prefetch(
        self, work: Callable[[Step], dict[str, Any]], step: Step, ahead: Sequence[Step]
    ) -> dict[str, Any]:
        for following in ahead:
            if following.kind == "merge":
                for reader in self.job.readers:
                    reader.prefetch(following.keys)
        return work(step)

    def _is_done(self, phase: str, step: Step) -> bool:
        entry = self.journal.get(phase, _label(step))
        if entry is None:
            return False
        # The journal may have reached the disk before the bytes did.
        return (
            all(
                digest_region(self._folder(step) / place.file, place.start, place.nbytes) == entry["outputs"][key]
                for key, place in self._places(step).items()
            )
            if phase == "write"
            else True
        )

    # ---- The steps ----

    def _vectors(self, step: Step) -> dict[str, Any]:
        merger = self.job.merger
        merged = {} if merger.fused else merger.vectors(step.keys)
        for key, vector in merged.items():
            write_at(self._descriptors[SCRATCH_NAME], vector.cpu(), self._offsets[key])
        return {"norms": merger.norms(step.keys, merged)}

    def _write(self, step: Step) -> dict[str, Any]:
        outputs: dict[str, str] = {}
        inputs: list[dict[str, str]] = [{} for _ in self.job.readers]
        merger, leaders = self.job.merger, self.job.plan.groups
        if step.kind == "merge":
            vectors: dict[str, Tensor] = {}
            if not merger.fused:
                vectors = self._read_scratch(step) if merger.needs_norms else merger.vectors(step.keys)
            for key in step.keys:
                digests = [xxhash.xxh3_128() for _ in self.job.readers]
                pieces = merger.pieces(key, vectors.pop(key, None), partial(_add, digests))
                outputs |= self._store(self.job.layout, "", leaders[key], pieces)
                self._note_inputs(key, digests, inputs)
        elif step.kind == "copy":
            (key,) = step.keys
            outputs = self._store(self.job.layout, "", [key], self._copied(key))
            self._note_inputs(key, [], inputs)
        else:
            name = step.kind.partition(":")[2]
            source = self.job.sources[[model.name for model in self.job.recipe.models].index(name)]
            for key in step.keys:
                outputs |= self._store(self.job.private[name], f"{PRIVATE_FOLDER}/", [key], _pieces(source[key]))
        return {"outputs": outputs, "inputs": inputs}

    def _copied(self, key: str) -> Iterator[Tensor]:
        tensor = self.job.pooled.get(key, self.job.plan.reference[key])
        dtype = self.job.layout.tensors[key].dtype
        return (converted(piece, dtype, key) for piece in _pieces(tensor))

    def _store(self, layout: Layout, prefix: str, keys: Sequence[str], pieces: Iterator[Tensor]) -> dict[str, str]:
        """Writes one tensor under all its names; returns the digests of its bytes."""
        digest, done = xxhash.xxh3_128(), 0
        places = {key: layout.places[key] for key in keys}
        for piece in pieces:
            piece = piece.cpu()
            for place in places.values():
                data = write_at(self._descriptors[prefix + place.file], piece, place.start + done)
            digest.update(data)
            done += piece.numel() * piece.itemsize
        return dict.fromkeys(keys, digest.hexdigest())

    def _note_inputs(self, key: str, digests: Sequence[Any], inputs: Sequence[dict[str, str]]) -> None:
        """Notes the digest of a tensor in every input, taken on the way if all of its entries were read there."""
        untouched = xxhash.xxh3_128().hexdigest()
        for place, reader in enumerate(self.job.readers):
            if key not in reader:
                continue
            whole = digests and key not in self.job.plan.rows and self.job.sources[place] is reader
            digest = digests[place].hexdigest() if whole else untouched
            inputs[place][key] = digest if digest != untouched else _digest(reader[key])

    # ---- Files ----

    def _folder(self, step: Step) -> Path:
        return self.staging / PRIVATE_FOLDER if step.kind.startswith("private:") else self.staging

    def _places(self, step: Step) -> dict[str, Place]:
        if step.kind.startswith("private:"):
            return {key: self.job.private[step.kind.partition(":")[2]].places[key] for key in step.keys}
        groups = self.job.plan.groups
        return {name: self.job.layout.places[name] for key in step.keys for name in groups.get(key, [key])}

    def _open_scratch(self) -> None:
        merger, end = self.job.merger, 0
        for key in merger.plan.leaders:
            self._offsets[key] = end
            end += offset_step(merger, key)

    def _read_scratch(self, step: Step) -> dict[str, Tensor]:
        merger = self.job.merger
        size = scratch_size(merger)
        scratch = torch.from_file(str(self.staging / SCRATCH_NAME), shared=True, size=size, dtype=torch.uint8)
        vectors = {}
        for key in step.keys:
            dtype, shape = merger.plan.dtypes[key], merger.views[0].shape(key)
            start = self._offsets[key]
            vectors[key] = scratch[start : start + shape.numel() * dtype.itemsize].view(dtype).reshape(shape)
        return vectors


def create_files(job: Job, staging: Path) -> None:
    """Makes every file of a merge in its final size."""
    job.layout.create(staging)
    if job.private:
        (staging / PRIVATE_FOLDER).mkdir()
    for layout in job.private.values():
        layout.create(staging / PRIVATE_FOLDER)
    if job.alignment is not None:
        job.alignment.save(staging / MAPS_NAME)
    if has_scratch(job.merger):
        with open(staging / SCRATCH_NAME, "wb") as handle:
            handle.truncate(scratch_size(job.merger))


@contextmanager
def single_threaded(workers: int, merger: Merger) -> Iterator[None]:
    """Leaves the cores to the workers: linear algebra inside each runs on one thread, that of SciPy included."""
    if workers == 1:
        yield
        return
    if merger.decomposes:
        # A library that is loaded later would not hear of the limit.
        import scipy.linalg  # noqa: F401
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Two workers that share OpenBLAS's pool of threads would wait for each other most of the time.
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def _label(step: Step) -> str:
    return f"{step.kind}|{step.keys[0]}"


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    row = flat(tensor)
    return (row[start : start + CHUNK] for start in range(0, row.numel(), CHUNK))


def _add(digests: Sequence[Any], number: int, piece: Tensor) -> None:
    digests[number].update(bytes_of(piece))


def _digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor))
