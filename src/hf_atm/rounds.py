"""One round's arithmetic: capture task vectors, merge them, step the base. Knows tensors, not the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .geometry import Sketch, cosines, gram_matrix, squared_norm
from .line_search import search_step
from .merge_report import DivergenceError, MergeReport
from .merging import get_merge_method, linear_coefficients, merge_buffers, merge_task_vectors, norm_scale
from .merging.linear import is_linear
from .moment_weights import entrywise_mean
from .outer import OuterOptimizer, clip_factors
from .round_checkpoint import RoundCheckpoint
from .seeding import derive_seed
from .spaces import DenseTaskVector, Space, TaskVector
from .surgery import SURGERIES, MixedTaskVector


class RoundState(RoundCheckpoint):
    """Base and task vectors of the round in progress.

    A linear merge over whole weights keeps one running sum beside the base: two copies of the shared weights whatever
    the number of tasks. Everything else keeps one vector per task.

    Args:
        space (`Space`): the shared part of the model.
        tasks (`list[str]`): all tasks of a round.
        weights (`Mapping[str, float]`): weight per task, unless [`merge`] is given others.
        method (`str`): a registered merge method.
        merge_kwargs (`Mapping[str, Any]`): its parameters; `scaling_coefficient` may be a number or `"norm"`.
        outer (`OuterOptimizer`): steps the base.
        max_norm (`float`, `"mean"` or `None`): clips task vectors.
        keep (`bool`): hold every task vector even where a sum would do, and beyond the merge.
        statistics (`Mapping[str, Tensor]`, *optional*): live running statistics of batch normalisation, pooled over
            tasks in every round.
        surgery (`str`, *optional*): a name of `SURGERIES`, done to the task vectors before they are merged.
        seed (`int`, *optional*, defaults to 0): decides the orders that surgery takes tasks in.
        anchored (`bool`, *optional*, defaults to `False`): measure task vectors from where the run started rather
            than from the round's base, and make the merge a move from there (METIS).
        hold (`bool`, *optional*, defaults to `False`): whether [`merge`] will need every task vector, so that no sum
            can be made before.
        entrywise (`bool`, *optional*, defaults to `False`): whether [`capture`] will be given a weight for each entry
            of a task vector, for a mean. One more copy of the shared weights; one per task where vectors are held.
    """

    def __init__(
        self,
        space: Space,
        tasks: list[str],
        weights: Mapping[str, float],
        method: str,
        merge_kwargs: Mapping[str, Any],
        outer: OuterOptimizer,
        max_norm: float | str | None = None,
        keep: bool = False,
        statistics: Mapping[str, Tensor] | None = None,
        surgery: str | None = None,
        seed: int = 0,
        anchored: bool = False,
        hold: bool = False,
        entrywise: bool = False,
    ) -> None:
        self.space = space
        self.tasks = tasks
        self.method = get_merge_method(method).name
        self.merge_kwargs = dict(merge_kwargs)
        self.outer = outer
        self.max_norm = max_norm
        self.linear = is_linear(method)
        self.keep = keep
        self.surgery = surgery
        self.seed = seed
        self.anchored = anchored
        self.entrywise = entrywise
        self.origin: dict[str, Tensor] = {}
        self.mixing: Tensor | None = None
        self.streaming = self.linear and not (keep or space.compact or max_norm == "mean" or surgery or hold)
        self.statistics = dict(statistics or {})
        self.method_kwargs = {key: value for key, value in merge_kwargs.items() if key != "scaling_coefficient"}
        self._weigh(weights)
        self.merged_vectors: dict[str, TaskVector] = {}
        # What the experts of the last merge had in their heads and the merged model has not.
        self.expert_heads: dict[str, dict[str, Tensor]] = {}
        self._clear()

    def _weigh(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        if self.linear:
            values = [self.weights[task] for task in self.tasks]
            coefficients = linear_coefficients(self.method, values, **self.method_kwargs)
            self.coefficients = dict(zip(self.tasks, coefficients, strict=True))

    def _clear(self) -> None:
        self.norms: dict[str, float] = {}
        self.vectors: dict[str, TaskVector] = {}
        self.sum: dict[str, Tensor] = {}
        self.weight_sum: dict[str, Tensor] = {}
        self.entry_weights: dict[str, Mapping[str, Tensor]] = {}
        self.sketches: dict[str, Tensor] = {}
        self.task_statistics: dict[str, dict[str, Tensor]] = {}
        self.heads: dict[str, dict[str, Tensor]] = {}

    def open(self) -> None:
        """Start a round from the live model."""
        self.base = self.space.snapshot()
        if self.anchored and not self.origin:
            self.origin = self.space.snapshot()
        self.base_statistics = self._read_statistics()
        self.merged_vectors = {}
        self._clear()

    @property
    def start(self) -> dict[str, Tensor]:
        """Where this round's task vectors begin, and the merged move too."""
        return self.origin if self.anchored else self.base

    def _read_statistics(self) -> dict[str, Tensor]:
        return {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.statistics.items()}

    def capture(self, task: str, entry_weights: Mapping[str, Tensor] | None = None) -> float:
        """Take the live model's task vector.

        Args:
            task (`str`): the task it belongs to.
            entry_weights (`Mapping[str, Tensor]`, *optional*): with `entrywise`, a weight for each of its entries.

        Returns:
            `float`: its L2 norm before clipping.

        Raises:
            DivergenceError: when it holds NaN or infinity; the round cannot be merged any more then.
        """
        if self.streaming:
            norm = self._add_to_sum(task, entry_weights)
        else:
            vector = self.space.capture(self.start)
            norm = _norm(vector.values())
            if math.isfinite(norm):
                self.vectors[task] = vector
                if entry_weights is not None:
                    self.entry_weights[task] = entry_weights
        if not math.isfinite(norm):
            raise DivergenceError(
                f"The task vector of task {task!r} holds NaN or infinity; lower learning_rate, check the task's labels, "
                "or leave the task out."
            )
        self.norms[task] = norm
        if self.statistics:
            self.task_statistics[task] = self._read_statistics()
        return norm

    def _add_to_sum(self, task: str, entry_weights: Mapping[str, Tensor] | None) -> float:
        shapes = self.space.shapes
        sketch = Sketch(sum(shape.numel() for shape in shapes.values()), next(iter(self.base.values())).device)
        scale = self.coefficients[task]
        if self.max_norm is not None:
            squares = [squared_norm(self.space.difference(self.start, name)) for name in shapes]
            scale *= clip_factors({task: math.sqrt(sum(squares))}, self.max_norm)[task]
        total = 0.0
        for name in shapes:
            difference = self.space.difference(self.start, name)
            total += squared_norm(difference)
            sketch.add(difference)
            if entry_weights is not None:
                difference.mul_(entry_weights[name])
                _accumulate(self.weight_sum, name, entry_weights[name].clone(), self.coefficients[task])
            _accumulate(self.sum, name, difference, scale)
        self.sketches[task] = sketch.values
        return math.sqrt(total)

    def tuned(self, task: str) -> dict[str, Tensor]:
        """The shared weights that a task was captured with; its vector must be held."""
        vector = self.vectors[task]
        return {name: self.start[name] + vector.read(name) for name in self.space.shapes}

    def reorder(self, task: str, order: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        """Replace what was captured of a task by the same model with its units in another order.

        Args:
            task (`str`): a captured task whose vector is held.
            order (`Callable`): maps named tensors of the task's model to that order.
        """
        tuned = order(self.tuned(task))
        self.vectors[task] = DenseTaskVector({name: tuned[name] - self.start[name] for name in self.space.shapes})
        self.norms[task] = _norm(self.vectors[task].values())
        if task in self.entry_weights:
            self.entry_weights[task] = order(self.entry_weights[task])
        if task in self.task_statistics:
            self.task_statistics[task] = order(self.task_statistics[task])

    def restore(self) -> None:
        """Write the round's base back into the live model."""
        self.space.restore(self.base)
        self._write_statistics(self.base_statistics)

    @torch.no_grad()
    def _write_statistics(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self.statistics.items():
            buffer.copy_(values[name])

    def merge(
        self,
        round_index: int,
        weights: Mapping[str, float] | None = None,
        losses: Callable[[], Mapping[str, float]] | None = None,
        observe: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None,
    ) -> MergeReport:
        """Merge all task vectors, step the base, write it into the live model and begin the next round there.

        Args:
            round_index (`int`): 0-based round.
            weights (`Mapping[str, float]`, *optional*): this round's weights, in place of the constant ones.
            losses (`Callable[[], Mapping[str, float]]`, *optional*): validation loss of every task with the live
                model; given, the outer step is searched.
            observe (`Callable[[Mapping[str, Tensor]], dict]`, *optional*): is shown how the base is about to move,
                while all task vectors are still there; what it returns goes into the report's `diagnostics`.

        Returns:
            [`MergeReport`]: without `seconds`.

        Raises:
            DivergenceError: when the merged update holds NaN or infinity; the base stands as it was.
        """
        norms = {task: self.norms[task] for task in self.tasks}
        if weights is not None:
            self._weigh(weights)
        self.mixing = self._operate(round_index)
        merged = self._merged()
        merged_norm = _norm(merged.values())
        if not math.isfinite(merged_norm):
            raise DivergenceError(
                f"The merge by {self.method!r} in round {round_index} gave NaN or infinity; try another merge_method "
                "or other merge_kwargs."
            )
        self.step_size = self.outer.step_size(self._counted_norms(), merged_norm)
        angles, exact = self._cosines()
        if self.statistics:
            self.pool_statistics()
        move = self.outer.step(merged, 1.0)
        tried: dict[float, float] = {}
        if losses is not None:
            self.step_size, tried = self._search(move, losses)
        if self.step_size != 1.0:
            for tensor in move.values():
                tensor.mul_(self.step_size)
        diagnostics = {} if observe is None else observe(move)
        if self.anchored:
            self.base = {name: tensor.clone() for name, tensor in self.origin.items()}
        self.space.advance(self.base, move)
        # The next round starts here. Small vectors stay for export; large ones have done their work.
        self.base_statistics = self._read_statistics()
        self.merged_vectors = self.vectors if self.space.compact or self.keep else {}
        self.expert_heads = self.heads
        self._clear()
        return MergeReport(
            round=round_index,
            tasks=list(self.tasks),
            method=self.method,
            weights=dict(self.weights),
            task_vector_norms=norms,
            cosines=angles,
            cosines_exact=exact,
            merged_norm=merged_norm,
            step_size=self.step_size,
            step_sizes_tried=[list(pair) for pair in tried.items()],
            diagnostics=diagnostics,
        )

    def pool_statistics(self) -> None:
        """Write what all tasks' running statistics make together into the live model."""
        pooled = merge_buffers(
            [self.task_statistics[task] for task in self.tasks],
            self.base_statistics,
            [self.weights[task] for task in self.tasks],
        )
        self._write_statistics(pooled)

    def _counted_norms(self) -> list[float]:
        """Norms of the task vectors that take part, as they enter the merge: clipped."""
        factors = clip_factors(self.norms, self.max_norm)
        return [self.norms[task] * factors[task] for task in self.tasks if self.weights[task] != 0]

    def _search(
        self, move: Mapping[str, Tensor], losses: Callable[[], Mapping[str, float]]
    ) -> tuple[float, dict[float, float]]:
        def losses_at(step_size: float) -> Mapping[str, float]:
            with self.space.probe(self.start, move, step_size):
                return losses()

        return search_step(losses_at, self.step_size)

    def _operate(self, round_index: int) -> Tensor | None:
        """The combinations of task vectors that surgery makes, if any is asked for."""
        if self.surgery is None:
            return None
        factors = clip_factors(self.norms, self.max_norm)
        # A task without weight takes no part, not even in what others lose.
        taking = [index for index, task in enumerate(self.tasks) if self.weights[task] != 0]
        names = [self.tasks[index] for index in taking]
        scale = torch.tensor([factors[task] for task in names], dtype=torch.float64)
        gram = gram_matrix([self.vectors[task] for task in names]) * scale[:, None] * scale
        mixing = torch.eye(len(self.tasks), dtype=torch.float64)
        rows = SURGERIES[self.surgery](gram, names, derive_seed(self.seed, "surgery", round_index))
        mixing[torch.tensor(taking)[:, None], torch.tensor(taking)] = rows
        return mixing

    def _merged(self) -> dict[str, Tensor]:
        factors = clip_factors(self.norms, self.max_norm)
        for task, vector in self.vectors.items():
            vector.factor = factors[task]
        merged = self.sum if self.streaming else self.merge_vectors(self.vectors)
        for name, weight in self.weight_sum.items():
            merged[name].div_(weight)
        scale = self.merge_kwargs.get("scaling_coefficient", 1.0)
        if scale == "norm":
            scale = norm_scale(self._counted_norms(), _norm(merged.values()))
        self.scale = float(scale)
        if self.scale != 1.0:
            for tensor in merged.values():
                tensor.mul_(self.scale)
        return merged

    def merge_vectors(self, vectors: Mapping[str, TaskVector]) -> dict[str, Tensor]:
        """What surgery and the round's method make of task vectors, before its scale and the outer step."""
        held: list[TaskVector] = [vectors[task] for task in self.tasks]
        if self.mixing is not None:
            held = [MixedTaskVector(held, row) for row in self.mixing.tolist()]
        if self.entrywise:
            coefficients = [self.coefficients[task] for task in self.tasks]
            return entrywise_mean(held, [self.entry_weights[task] for task in self.tasks], coefficients)
        return merge_task_vectors(
            held,
            method=self.method,
            weights=[self.weights[task] for task in self.tasks],
            names=self.tasks,
            **self.method_kwargs,
        )

    def linear_shares(self) -> dict[str, float] | None:
        """How much of each task vector the last move held, when that is all the move was; `None` otherwise."""
        if self.outer.momentum or not self.linear or not self.merged_vectors:
            return None
        shares = torch.tensor([self.coefficients[task] for task in self.tasks], dtype=torch.float64)
        if self.mixing is not None:
            shares = shares @ self.mixing
        scale = self.scale * self.step_size
        return {
            task: share * scale * self.merged_vectors[task].factor
            for task, share in zip(self.tasks, shares.tolist(), strict=True)
        }

    def last_move(self) -> dict[str, Tensor]:
        """The last move of the base, computed again from the vectors that were kept."""
        merged = self.merge_vectors(self.merged_vectors)
        for tensor in merged.values():
            tensor.mul_(self.scale)
        return self.outer.last_move(merged, self.step_size)

    def _cosines(self) -> tuple[dict[str, dict[str, float]], bool]:
        if self.streaming:
            gram = gram_matrix([{"sketch": self.sketches[task]} for task in self.tasks])
        else:
            gram = gram_matrix([self.vectors[task] for task in self.tasks])
        rows = cosines(gram).tolist()
        exact = not self.streaming or sum(shape.numel() for shape in self.space.shapes.values()) <= Sketch.width
        return {
            task: dict(zip(self.tasks, row, strict=True)) for task, row in zip(self.tasks, rows, strict=True)
        }, exact


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(squared_norm(tensor) for tensor in tensors))


def _accumulate(sums: dict[str, Tensor], name: str, tensor: Tensor, factor: float) -> None:
    """Add `factor` x `tensor` to a sum; the first one becomes it, in place."""
    if name in sums:
        sums[name].add_(tensor, alpha=factor)
    else:
        sums[name] = tensor.mul_(factor)
