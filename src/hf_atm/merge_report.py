"""What one merge did, and what is raised when it cannot be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class DivergenceError(FloatingPointError):
    """A loss or task vector became NaN or infinite; the model holds the last merged weights again."""


@dataclass
class MergeReport:
    """What one merge did.

    Attributes:
        round: 0-based round.
        tasks: tasks merged, in the plan's order.
        method: name of the merge method.
        weights: weight per task, before any normalisation by the method.
        task_vector_norms: L2 norm of each round-local task vector, before clipping.
        cosines: cosine of each pair of task vectors, by task and task.
        cosines_exact: `False` when the vectors were summed as they came and cosines are estimated to about 0.002.
        merged_norm: L2 norm of the merged update, before the outer step.
        step_size: factor between the merged update and the base's move (momentum aside).
        loss_gaps: what the last merge cost each task in validation loss, with `task_weights="loss_gap"`.
        step_sizes_tried: pairs of step size and mean relative validation loss, when the step was searched.
        searching: examples evaluated for `loss_gaps` and `step_sizes_tried`.
        moved_units: units of each task's model that changed places, with `align_every_round`.
        diagnostics: what `diagnostics` asks for beyond that, see [`RoundDiagnostics.observe`].
        seconds: wall time spent in this round on `tuning`, `merging`, `searching` and `evaluating`.
    """

    round: int
    tasks: list[str]
    method: str
    weights: dict[str, float]
    task_vector_norms: dict[str, float]
    cosines: dict[str, dict[str, float]]
    cosines_exact: bool
    merged_norm: float
    step_size: float
    loss_gaps: dict[str, float] = field(default_factory=dict)
    step_sizes_tried: list[list[float]] = field(default_factory=list)
    searching: int = 0
    moved_units: dict[str, int] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)
