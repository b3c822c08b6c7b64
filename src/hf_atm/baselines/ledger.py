"""What a run cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..trainer import ATMTrainer


def shared_bytes(trainer: ATMTrainer) -> int:
    """Bytes of the parameters that tasks share and training changes, as float32: what one message holds."""
    return 4 * sum(parameter.numel() for parameter in trainer.atm.groups.shared.values())


def communicated_bytes(trainer: ATMTrainer, joint: bool) -> int:
    """Bytes that would travel if every task's data stayed in a place of its own, with a server in the middle.

    A merge takes 2 T P bytes: T task vectors to the server, T copies of the new base back. A step of joint training
    takes 2 P: one gradient to the server, new weights back to the place whose turn it is next.
    """
    plan = trainer.atm.plan
    messages = plan.total_steps if joint else len(plan.tasks) * plan.num_rounds
    return 2 * messages * shared_bytes(trainer)


def cost_of(trainer: ATMTrainer, joint: bool, seconds: float) -> dict[str, Any]:
    """The ledger of a finished run.

    Args:
        trainer ([`ATMTrainer`]): after `train()`.
        joint (`bool`): whether all tasks trained the same weights step by step.
        seconds (`float`): wall time of the whole run, evaluation included.

    Returns:
        `dict`: `optimizer_steps` and `examples` over all tasks, `seconds`, of which `seconds_by_part`,
        `communicated_bytes` (see [`communicated_bytes`]), and `searched_examples`, evaluated for the run's own
        decisions.
    """
    plan, records = trainer.atm.plan, trainer.report
    return {
        "optimizer_steps": plan.total_steps,
        "examples": plan.total_steps * trainer.atm.global_batch,
        "seconds": seconds,
        "seconds_by_part": _added([record["seconds"] for record in records]),
        "communicated_bytes": communicated_bytes(trainer, joint),
        "searched_examples": sum(record.get("searching", 0) for record in records),
    }


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for part in parts for name in part})
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
