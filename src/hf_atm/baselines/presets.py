"""The methods ATM is compared with, as settings of the one loop or of joint training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..callbacks import ATMCallback
from ..seeding import derive_seed


class FreshHeads(ATMCallback):
    """Every round begins with new heads, so that nothing but the shared weights goes from round to round."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def check(self, model: Any) -> None:
        """Refuse a model whose heads cannot be made anew.

        Raises:
            ValueError: naming what is needed.
        """
        if not hasattr(model, "reset_head"):
            raise ValueError("cold_fusion makes new heads, and needs a MultiTaskModel without an adapter.")

    def on_round_begin(self, args, state, control, *, round, model=None, **kwargs):
        for task in model.heads:
            model.reset_head(task, derive_seed(self.seed, "fresh head", round))


@dataclass(frozen=True)
class Baseline:
    """A method that [`compare`] can run.

    Args:
        kind (`str`): `"atm"`, `"joint"`, `"joint_proportional"`, `"heads"` (joint training of the heads over a frozen
            backbone) or `"one_shot"` (one round as long as the whole run, merged by several methods).
        summary (`str`): what it is and where it comes from.
        settings (`Callable[[Sequence[str]], dict]`): fields of [`ATMConfig`] beyond `NEUTRAL`, given the tasks.
        inherits (`bool`): whether the method is what the common settings make it, and not what `NEUTRAL` does.
        callbacks (`Callable[[int], list]`): callbacks of the run, given its seed.
    """

    kind: str
    summary: str
    settings: Callable[[Sequence[str]], dict[str, Any]] = lambda tasks: {}
    callbacks: Callable[[int], list[FreshHeads]] = lambda seed: []
    inherits: bool = False


# A named method is what its paper says, whatever else the file's settings are for ATM.
NEUTRAL: Mapping[str, Any] = {
    "merge_method": "mean",
    "merge_kwargs": {},
    "moment_exponent": 0.0,
    "head_steps": 0,
    "head_learning_rate_ratio": 1.0,
    "outer_learning_rate": 1.0,
    "outer_momentum": 0.0,
    "outer_nesterov": True,
    "task_weights": "uniform",
    "loss_gap_temperature": 1.0,
    "task_vector_surgery": None,
    "task_vector_origin": "round",
    "align_every_round": False,
    "max_task_vector_norm": None,
    "optimizer_policy": "reset",
    "lr_schedule_scope": "segment",
}
_WHOLE_STATE = {"optimizer_policy": "per_task", "lr_schedule_scope": "run"}

# Found on validation data of the benchmark's suites; see docs/results.md.
_RECOMMENDED = {
    "merge_method": "mean",
    "outer_learning_rate": "norm",
    "head_steps": 0.2,
    "head_learning_rate_ratio": 10.0,
    "optimizer_policy": "per_task",
    "lr_schedule_scope": "run",
    "lr_scheduler_type": "linear",
}

BASELINES: Mapping[str, Baseline] = {
    "pretrained": Baseline("heads", "The pretrained backbone, frozen; heads alone are trained."),
    "one_shot": Baseline(
        "one_shot",
        "Individual experts, tuned for the whole budget, and one merge of them by several methods, with each method's "
        "usual scale and with the one that validation data choose.",
    ),
    "joint": Baseline("joint", "Joint multi-task training, every task equally often."),
    "joint_proportional": Baseline(
        "joint_proportional", "Joint multi-task training, tasks sampled in proportion to their sizes."
    ),
    "atm": Baseline("atm", "ATM as the settings have it (https://huggingface.co/papers/2411.03055).", inherits=True),
    "recommended": Baseline(
        "atm",
        "The settings recommended in docs/choosing.md for full weights.",
        lambda tasks: {**_RECOMMENDED, "moment_exponent": 1.0},
    ),
    "recommended_lora": Baseline(
        "atm", "The settings recommended in docs/choosing.md for LoRA.", lambda tasks: dict(_RECOMMENDED)
    ),
    "fedavg": Baseline(
        "atm",
        "FedAvg with full participation (https://huggingface.co/papers/1602.05629); ATM with the mean is the same "
        "algorithm with equal weights.",
        lambda tasks: {
            "merge_method": "mean",
            "task_weights": "num_examples",
            "outer_learning_rate": 1.0,
            "optimizer_policy": "reset",
        },
    ),
    "diloco": Baseline(
        "atm",
        "DiLoCo (https://huggingface.co/papers/2311.08105): Nesterov momentum outside, AdamW state kept inside.",
        lambda tasks: {
            "merge_method": "mean",
            "outer_learning_rate": 0.7,
            "outer_momentum": 0.9,
            "outer_nesterov": True,
            **_WHOLE_STATE,
        },
    ),
    "isoloco": Baseline(
        "atm",
        "IsoLoCo (https://huggingface.co/papers/2607.03011): DiLoCo with Iso-C in place of the mean.",
        lambda tasks: {
            "merge_method": "iso_c",
            # Iso-C of the mean; with equal weights of one it would be that of the sum.
            "task_weights": dict.fromkeys(tasks, 1 / len(tasks)),
            "outer_learning_rate": 1.8,
            "outer_momentum": 0.8,
            "outer_nesterov": True,
            **_WHOLE_STATE,
        },
    ),
    "metis": Baseline(
        "atm",
        "METIS (https://huggingface.co/papers/2606.16501): loss-gap weights and a consensus mask on task vectors from "
        "the start; temperature, step and mask are ours, as the paper's are not known to us.",
        lambda tasks: {
            "merge_method": "consensus",
            # Weights have mean 1, and those of METIS sum to 1.
            "merge_kwargs": {"scaling_coefficient": 1 / len(tasks)},
            "task_weights": "loss_gap",
            "task_vector_origin": "start",
        },
    ),
    "cold_fusion": Baseline(
        "atm",
        "ColD Fusion (https://huggingface.co/papers/2212.01378): averaging with new heads in every round, all tasks "
        "taking part.",
        lambda tasks: {"merge_method": "mean", "outer_learning_rate": 1.0, "optimizer_policy": "reset"},
        lambda seed: [FreshHeads(seed)],
    ),
}


def get_baseline(name: str) -> Baseline:
    """The baseline of that name.

    Raises:
        KeyError: listing the known ones.
    """
    if name not in BASELINES:
        raise KeyError(f"There is no baseline {name!r}; there are {', '.join(BASELINES)}.")
    return BASELINES[name]
