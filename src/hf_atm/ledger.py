"""What a run cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def shared_bytes(trainer: Any) -> int:
    """Bytes of the parameters that tasks share and training changes, as float32: what one message holds."""
    return 4 * sum(parameter.numel() for parameter in trainer.atm.groups.shared.values())


def communicated_bytes(trainer: Any) -> int:
    """Bytes that would travel if every task's data stayed in a place of its own, with a server in the middle.

    A merge takes T task vectors to the server (twice as much with `moment_exponent`, whose weights go along) and T
    copies of the new base back; a step size that is searched, T copies more of each candidate. A step of joint training
    takes one gradient to the server and new weights to the place whose turn it is next.
    """
    plan = trainer.atm.plan
    if not trainer.atm.merging:
        return 2 * plan.total_steps * shared_bytes(trainer)
    up = 2 if trainer.args.moment_exponent else 1
    candidates = sum(len(record["step_sizes_tried"]) for record in trainer.report)
    return len(plan.tasks) * ((up + 1) * plan.num_rounds + candidates) * shared_bytes(trainer)


def cost_of(trainer: Any) -> dict[str, Any]:
    """The ledger of a run that has ended.

    Args:
        trainer ([`ATMTrainer`]): after `train()`.

    Returns:
        `dict`: `optimizer_steps` and `examples` over all tasks; `seconds` of wall time, all starts of a resumed run
        together, and `seconds_by_part`; `communicated_bytes` (see [`communicated_bytes`]); `searched_examples`,
        evaluated for the run's own decisions.
    """
    plan, records = trainer.atm.plan, trainer.report
    parts = _added([record["seconds"] for record in records])
    return {
        "optimizer_steps": plan.total_steps,
        "examples": plan.total_steps * trainer.atm.global_batch,
        "seconds": sum(parts.values()),
        "seconds_by_part": parts,
        "communicated_bytes": communicated_bytes(trainer),
        "searched_examples": sum(record.get("searching", 0) for record in records),
    }


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for part in parts for name in part})
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
