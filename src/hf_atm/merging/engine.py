"""From T models to merged tensors, piece by piece: the same arithmetic for state dicts in memory and files on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .linear import is_linear, linear_coefficients
from .plan import MergePlan, State
from .postprocess.registry import apply_post_processors, prepare_post_processors
from .registry import MergeMethod
from .task_vectors import norm_scale
from .tensors import CHUNK, LazyTensors, all_finite, check_finite, converted, listed


Norms = dict[str, list[float]]
Watch = Callable[[int, Tensor], None]


class Source(NamedTuple):
    """One term of a weighted sum: its coefficient, its entries in one row, and the number of the input it is from."""

    coefficient: float
    row: Tensor
    number: int | None


class ModelView(LazyTensors):
    """A model's task vector `theta_t - theta_0`, or its parameters, computed when read so that no copy is ever held.

    Args:
        name (`str`): for messages.
        state (`Mapping[str, Tensor]`): the model's tensors.
        origin (`Mapping[str, Tensor]`, *optional*): the base; without one, parameters are given as they are.
        plan (`MergePlan`): dtypes and rows.
        keys (`Sequence[str]`): the tensors to show.
        device (`torch.device`, *optional*): where to compute.

    Raises:
        ValueError: on reading entries that are not finite.
    """

    def __init__(
        self,
        name: str,
        state: State,
        origin: State | None,
        plan: MergePlan,
        keys: Sequence[str],
        device: torch.device | None = None,
    ) -> None:
        self.name, self.state, self.origin, self.plan, self.keys_, self.device = (
            name,
            state,
            origin,
            plan,
            keys,
            device,
        )
        self._last: tuple[str, Tensor, Tensor | None] | None = None

    def only(self, keys: Sequence[str]) -> ModelView:
        """The same view of fewer tensors."""
        return ModelView(self.name, self.state, self.origin, self.plan, keys, self.device)

    def shape(self, key: str) -> torch.Size:
        shape = self.state.shape(key) if isinstance(self.state, LazyTensors) else self.state[key].shape
        return torch.Size((self.plan.rows[key], *shape[1:])) if key in self.plan.rows else shape

    def dtype(self, key: str) -> torch.dtype:
        return self.plan.dtypes[key]

    def stored_dtype(self, key: str) -> torch.dtype:
        return self.state.dtype(key) if isinstance(self.state, LazyTensors) else self.state[key].dtype

    def chunk(self, key: str, start: int, stop: int) -> Tensor:
        return self._checked(key, slice(start, stop))

    def strided(self, key: str, start: int, step: int) -> Tensor:
        return self._part(key, slice(start, self.shape(key).numel(), step))

    def __getitem__(self, key: str) -> Tensor:
        shape = self.shape(key)
        return self._checked(key, slice(0, shape.numel())).view(shape)

    def _checked(self, key: str, part: slice) -> Tensor:
        piece = self._part(key, part)
        if not all_finite(piece):
            # The base counts too, and is to blame for all.
            if self.origin is not None:
                check_finite(flat(self.origin[key])[part], key, "base")
            check_finite(flat(self.state[key])[part], key, self.name)
            raise ValueError(f"Tensor '{key}' of '{self.name}' is further from its base than {piece.dtype} can tell.")
        return piece

    def _part(self, key: str, part: slice) -> Tensor:
        last = self._last
        if last is None or last[0] != key:
            # Looking a tensor up in a file, or laying it out flat, takes longer than the arithmetic of a chunk.
            last = key, flat(self.state[key]), None if self.origin is None else flat(self.origin[key])
            self._last = last
        _, own, origin = last
        piece = own[part].to(self.device or own.device, self.plan.dtypes[key])
        if origin is None:
            return piece
        # A converted piece is a copy already; the input itself must stay as it is.
        subtract = piece.sub_ if piece.dtype != own.dtype else piece.sub
        return subtract(origin[part].to(piece.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


class Merger:
    """One merge, ready to be carried out tensor by tensor, in any order and from several threads.

    Args:
        plan (`MergePlan`): what to merge.
        models (`Sequence[Mapping[str, Tensor]]`): T models.
        origin (`Mapping[str, Tensor]`, *optional*): their base.
        rule (`MergeMethod`): the method.
        weights, names (`Sequence`): T weights and T different names.
        kwargs (`Mapping[str, Any]`): the method's keywords, checked.
        scale (`float` or `str`): lambda, or `"norm"`.
        postprocess (`Sequence`, *optional*): post-processors on the merged task vector, checked.
        device (`torch.device`, *optional*): where to compute; by default where the tensors lie.
    """

    def __init__(
        self,
        plan: MergePlan,
        models: Sequence[State],
        origin: State | None,
        rule: MergeMethod,
        weights: Sequence[float],
        names: Sequence[str],
        kwargs: Mapping[str, Any],
        scale: float | str = 1.0,
        postprocess: Sequence[Any] = (),
        device: torch.device | None = None,
    ) -> None:
        self.plan, self.models, self.origin = plan, models, origin
        self.rule, self.weights, self.names, self.kwargs = rule, list(weights), list(names), dict(kwargs)
        self.scale, self.postprocess, self.device = scale, list(postprocess), device
        # Angles between parameters and angles between task vectors differ; these methods mean the former.
        self.on_parameters = not rule.requires_base and (origin is None or rule.family == "geometric")
        self.task_vectors = [
            ModelView(name, state, origin, plan, plan.leaders, device)
            for name, state in zip(self.names, models, strict=True)
        ]
        #: What the method is given.
        self.views = [
            ModelView(view.name, view.state, None, plan, plan.leaders, device) if self.on_parameters else view
            for view in self.task_vectors
        ]
        self.parts = rule.partition(plan.leaders, self.kwargs)
        self.fused = is_linear(rule.name) and not self.postprocess
        #: Whether matrices are decomposed on the way.
        self.decomposes = rule.family in ("spectral", "gram") or bool(self.postprocess)
        #: Whether the factor on the merged vector depends on the norms of the whole model.
        self.needs_norms = isinstance(scale, str) or rule.rescale is not None
        self.factor = 1.0 if isinstance(scale, str) else float(scale)
        self.context: dict[str, Any] = {}
        self.post_context: Any = None

    def prepare(self) -> None:
        """Gathers what method and post-processors must know of the whole model; reads it as often as they need."""
        if not self.fused:
            self.context = self.rule.find_context(self.views, self.weights, self.names, self.kwargs)
        if self.postprocess:
            self.post_context = prepare_post_processors(
                self.postprocess, self.plan.leaders, self.task_vectors, self.weights, self.names, self.rule.name
            )

    def rehearse(self) -> None:
        """
        Merges the smallest tensor and the smallest matrix, and throws them away.

        Weights and keywords that the method cannot work with show here, and not after minutes.
        """
        if self.fused:
            linear_coefficients(self.rule.name, self.weights, normalize=self.kwargs.get("normalize"))
            return
        if "statistics" in self.rule.parameters:
            # They are of all tensors, and checked against their names.
            return
        sizes = {part[0]: sum(self.views[0].shape(key).numel() for key in part) for part in self.parts}
        by_size = sorted(self.parts, key=lambda part: (sizes[part[0]], part))
        # A decomposition takes too long for this from some size on.
        limit = CHUNK if self.decomposes else math.inf
        matrices = [p for p in by_size if len(self.views[0].shape(p[0])) > 1 and sizes[p[0]] <= limit]
        for part in [*by_size[:1], *matrices[:1]]:
            views = [view.only(part) for view in self.views]
            self.rule.function(views, self.weights, self.names, **self.kwargs)

    def vectors(self, part: Sequence[str]) -> dict[str, Tensor]:
        """Merged task vectors (parameters, where the method merges those) of one part, before any scale."""
        views = [view.only(part) for view in self.views]
        merged = self.rule.function(views, self.weights, self.names, **self.kwargs, **self.context)
        missing = [key for key in part if key not in merged]
        if missing:
            raise ValueError(f"Merge method '{self.rule.name}' returned no value for {listed(missing)}.")
        if self.on_parameters and self.origin is not None and (self.postprocess or self.scale != 1.0):
            merged = {key: merged[key].to(self.plan.dtypes[key]) - self._base(key, merged[key]) for key in part}
        if self.postprocess:
            moves = [view.only(part) for view in self.task_vectors]
            merged = apply_post_processors(
                self.postprocess, merged, moves, self.weights, self.names, self.post_context
            )
        return {key: merged[key].to(self.plan.dtypes[key]) for key in part}

    def norms(self, part: Sequence[str], merged: Mapping[str, Tensor]) -> Norms:
        """Squared norms per tensor: of every task vector of non-zero weight, then of the merged one.

        Args:
            part (`Sequence[str]`): the tensors.
            merged (`Mapping[str, Tensor]`): their merged task vectors; left empty for a plain sum, which is added up
                again here, piece by piece.
        """
        counted = [index for index, weight in enumerate(self.weights) if weight != 0]
        return {key: self._squares(key, sorted(counted, key=self.names.__getitem__), merged.get(key)) for key in part}

    def _squares(self, key: str, order: Sequence[int], merged: Tensor | None) -> list[float]:
        total, squares = self.task_vectors[0].shape(key).numel(), [0.0] * (len(order) + 1)
        shares = self.shares if merged is None else []
        for start in range(0, total, CHUNK):
            stop = min(total, start + CHUNK)
            pieces = [self.task_vectors[index].chunk(key, start, stop).double() for index in order]
            if merged is not None:
                pieces.append(flat(merged)[start:stop].double())
            else:
                sums = torch.zeros(stop - start, dtype=torch.float64)
                for index, piece in zip(order, pieces, strict=True):
                    sums.add_(piece.to(sums.device), alpha=shares[index])
                pieces.append(sums)
            for place, piece in enumerate(pieces):
                squares[place] += float(torch.dot(piece, piece))
        return squares

    def settle(self, norms: Norms) -> None:
        """Fixes the factor on the merged vector from the norms of all tensors; exact sums, so that order is nothing."""
        if not norms:
            return
        totals = [math.sqrt(math.fsum(column)) for column in zip(*norms.values(), strict=True)]
        *tasks, merged = totals
        factor = self.rule.rescale(tasks, merged) if self.rule.rescale is not None else 1.0
        self.factor = factor * (
            norm_scale(tasks, merged * abs(factor)) if isinstance(self.scale, str) else float(self.scale)
        )

    def pieces(self, key: str, vector: Tensor | None = None, watch: Watch | None = None) -> Iterator[Tensor]:
        """The finished tensor in its output type, as flat pieces in order; each is valid until the next is asked for.

        Args:
            key (`str`): the tensor.
            vector (`Tensor`, *optional*): its merged task vector; not needed where the merge is a plain sum.
            watch (`Callable`, *optional*): told the number of an input (the base's is T) and every flat piece of it that
                is read here, in order.
        """
        total = self.views[0].shape(key).numel()
        sources = self._sources(key, vector)
        device = self.device or sources[0].row.device
        size, out_dtype = min(total, CHUNK), self.plan.out_dtypes[key]
        # Buffers that are used again stay in the cache; fresh ones would be paid for page by page.
        sums, terms = (torch.empty(size, dtype=torch.float64, device=device) for _ in range(2))
        single = torch.empty(size, dtype=torch.float32, device=device)
        rounded = torch.empty(size, dtype=out_dtype, device=device)
        for start in range(0, total, CHUNK):
            count = min(total, start + CHUNK) - start
            piece = _weighted_piece(sources, start, sums[:count], terms[:count], watch)
            if out_dtype.itemsize < 4:
                # Exact halves between two bfloat16 neighbours are common (three coarse values, simple weights). Float32
                # in between takes the noise of float64's last digits off them, so that they go to the even neighbour.
                piece = single[:count].copy_(piece)
            piece = rounded[:count].copy_(piece)
            if not all_finite(piece):
                self._explain(key)
            yield piece
        if key in self.plan.rows:
            # The entries of a longer vocabulary follow those that all models share.
            rest = flat(self.plan.reference[key])[total:]
            for start in range(0, rest.numel(), CHUNK):
                yield converted(rest[start : start + CHUNK], out_dtype, key)

    def _sources(self, key: str, vector: Tensor | None) -> list[Source]:
        """What the result is a sum of; a coefficient of exactly one is no multiplication."""
        base = len(self.models)
        if vector is not None:
            merged = Source(self.factor, flat(vector), None)
            absolute = self.origin is None or (self.on_parameters and self.scale == 1.0 and not self.postprocess)
            return [merged] if absolute else [Source(1.0, flat(self.origin[key]), base), merged]  # type: ignore[index]
        order = sorted(range(len(self.names)), key=lambda index: self.names[index])
        shares, base_share = self.shares, self.base_share
        return [
            *([Source(base_share, flat(self.origin[key]), base)] if base_share and self.origin is not None else []),
            *(Source(shares[index], flat(self.models[index][key]), index) for index in order if shares[index]),
        ] or [Source(0.0, flat(self.models[0][key]), 0)]

    @property
    def shares(self) -> list[float]:
        """What each model counts for in a plain sum."""
        normalize = self.kwargs.get("normalize")
        shares = linear_coefficients(self.rule.name, self.weights, normalize=normalize)
        return [self.factor * share for share in shares]

    @property
    def base_share(self) -> float:
        """What the base counts for: exactly zero for a mean, which gives copies back to the bit (not from float64)."""
        normalized = self.kwargs.get("normalize", self.rule.parameters["normalize"])
        if self.origin is None or (normalized and self.factor == 1.0):
            return 0.0
        return 1.0 - math.fsum(self.shares)

    def _explain(self, key: str) -> None:
        for name, state in [*zip(self.names, self.models, strict=True), ("base", self.origin or {})]:
            if key in state:
                check_finite(state[key], key, name)
        raise ValueError(
            f"Tensor '{key}' overflows {self.plan.out_dtypes[key]} when merged; choose a wider output type, or a smaller "
            "scaling_coefficient."
        )

    def _base(self, key: str, like: Tensor) -> Tensor:
        base = self.plan.reference[key].detach()
        rows = self.plan.rows.get(key)
        return (base if rows is None else base[:rows]).to(like.device, self.plan.dtypes[key])


def merge_in_memory(merger: Merger) -> dict[str, Tensor]:
    """Carries a merge out; returns new tensors by leader."""
    merger.prepare()
    vectors: MutableMapping[str, Tensor] = {}
    norms: Norms = {}
    if merger.needs_norms:
        for part in merger.parts:
            merged = {} if merger.fused else merger.vectors(part)
            norms.update(merger.norms(part, merged))
            vectors.update(merged)
        merger.settle(norms)
    result = {}
    for part in merger.parts:
        if not merger.fused and not merger.needs_norms:
            vectors.update(merger.vectors(part))
        for key in part:
            reference, start = merger.plan.reference[key], 0
            out = torch.empty(reference.shape, dtype=merger.plan.out_dtypes[key], device=reference.device)
            for piece in merger.pieces(key, vectors.pop(key, None)):
                out.view(-1)[start : start + piece.numel()] = piece
                start += piece.numel()
            result[key] = out
    return result


def flat(tensor: Tensor) -> Tensor:
    """The entries of a tensor in one row; a view wherever the memory allows it."""
    return tensor.detach().reshape(-1)


def _weighted_piece(sources: Sequence[Source], start: int, sums: Tensor, terms: Tensor, watch: Watch | None) -> Tensor:
    """Entries from `start` of a weighted sum, accumulated in float64: in the cache, that costs little more."""
    stop = start + sums.numel()
    for place, source in enumerate(sources):
        piece = source.row[start:stop]
        if place == 0:
            sums.copy_(piece)
            if source.coefficient != 1.0:
                sums.mul_(source.coefficient)
        else:
            sums.add_(terms.copy_(piece), alpha=source.coefficient)
        if watch is not None and source.number is not None:
            # While the piece is in the cache.
            watch(source.number, piece)
    return sums
