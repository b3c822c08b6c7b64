"""Who takes part in a comparison: names, settings, and the budget they must share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import ATMConfig
from .one_shot import METHODS, check_methods
from .presets import NEUTRAL, Baseline, get_baseline


#: Settings that a comparison decides itself.
_RESERVED = ("output_dir", "seed", "data_seed", "num_train_epochs", "local_epochs", "resume_from_checkpoint")


@dataclass(frozen=True)
class Member:
    """One method in a comparison.

    Args:
        name (`str`): how tables call it.
        baseline (`str`): a name in `BASELINES`.
        settings (`dict`): fields of [`ATMConfig`] beyond the comparison's common ones.
        merges (`list[str]`): for `one_shot`, the merge methods.
    """

    name: str
    baseline: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    merges: Sequence[str] = ("mean", "ties", "dare", "tsv_m", "iso_c")

    @property
    def kind(self) -> str:
        """See [`Baseline`]."""
        return get_baseline(self.baseline).kind

    def resolve(self, tasks: Sequence[str], steps: int) -> dict[str, Any]:
        """All settings of the member's run: those of its baseline, its own, and its share of the budget."""
        baseline: Baseline = get_baseline(self.baseline)
        neutral = {} if baseline.inherits else NEUTRAL
        settings = {**neutral, **baseline.settings(sorted(tasks)), **self.settings}
        if self.kind == "one_shot":
            return {**settings, "num_rounds": 1, "local_steps": steps, "keep_task_vectors": True}
        return settings


def parse_members(members: Any) -> list[Member]:
    """Members from a mapping of names to settings, or a list of names, as a YAML file has them.

    A member's settings may be empty; `baseline` names its method where the name does not.

    Raises:
        KeyError: for an unknown baseline or merge.
        ValueError: for an unknown or reserved setting, or no member.
    """
    if isinstance(members, Sequence) and not isinstance(members, str):
        members = dict.fromkeys(members)
    if not isinstance(members, Mapping) or not members:
        raise ValueError("compare.members must name at least one method, such as {joint: {}, atm: {}}.")
    known = {f.name for f in fields(ATMConfig) if f.init}
    result = []
    for name, given in members.items():
        where = f"compare.members.{name}"
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{where} must hold settings, not {given!r}; leave it empty, or write {where}: {{}}.")
        if str(name) == "experts" or str(name).startswith("one-shot "):
            raise ValueError(f"{where}: that is what rows of one_shot are called; choose another name.")
        settings = dict(given or {})
        baseline = str(settings.pop("baseline", name))
        merges = settings.pop("merges", None)
        if get_baseline(baseline).kind == "one_shot":
            for key in ("num_rounds", "local_steps", "head_steps"):
                if key in settings:
                    raise ValueError(f"{where} sets {key}, but a one-shot merge is one round of experts; remove it.")
            merges = [merges] if isinstance(merges, str) else merges
            if merges is not None and not (isinstance(merges, Sequence) and all(isinstance(m, str) for m in merges)):
                raise ValueError(f"{where}.merges must be a list of names, not {merges!r}.")
            merges = check_methods(merges or Member.merges)
        elif merges is not None:
            raise ValueError(f"{where} sets merges ({', '.join(METHODS)}), which are for one_shot only.")
        for key in ("num_rounds", "local_steps"):
            value = settings.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}.{key} is {value!r}; it must be a whole number of at least 1.")
        for key in settings:
            if key in _RESERVED:
                raise ValueError(f"{where} sets {key}, which the comparison decides; remove it.")
            if key not in known:
                raise ValueError(f"{where} has the unknown setting {key!r}; use fields of ATMConfig.")
        result.append(Member(str(name), baseline, settings, tuple(merges or ())))
    return result


def check_budgets(
    members: Sequence[Member], tasks: Sequence[str], common: Mapping[str, Any], steps: int
) -> dict[str, dict[str, Any]]:
    """Every member's settings with rounds and local steps filled in, if all members have the same budget.

    Args:
        members (`Sequence[Member]`): the members.
        tasks (`Sequence[str]`): the tasks.
        common (`Mapping[str, Any]`): the comparison's own values of the fields that make up a budget.
        steps (`int`): optimizer steps per task that each member is to take.

    Returns:
        `dict[str, dict]`: settings by member; those that differ from the common ones.

    Raises:
        ValueError: naming every member with another number of steps, or of examples per step.
    """
    resolved, wrong = {}, []
    for member in members:
        settings = member.resolve(tasks, steps)
        rounds = settings.get("num_rounds", common["num_rounds"])
        if "local_steps" not in settings and steps % rounds == 0:
            settings["local_steps"] = steps // rounds
        local = settings.get("local_steps")
        if local is None:
            wrong.append(f"{member.name} cannot share out {steps} steps over {rounds} rounds")
        elif rounds * local != steps:
            wrong.append(f"{member.name} takes {rounds} x {local} = {rounds * local} steps per task, not {steps}")
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if settings.get(key, common[key]) != common[key]:
                wrong.append(f"{member.name} has {key}={settings[key]}, not {common[key]}")
        resolved[member.name] = settings
    if wrong:
        raise ValueError(f"The members differ in budget: {'; '.join(wrong)}; a comparison needs equal ones.")
    return resolved
