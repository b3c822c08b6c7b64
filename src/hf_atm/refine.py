"""Post-hoc ATM: rounds from a model that is merged already, and the best of them kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .config import ATMConfig
from .episodic import prototypical_head
from .merge_report import DivergenceError
from .trainer import ATMTrainer


_CHOICE = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "eval_on_start": False,
}


@dataclass
class Refinement:
    """What post-hoc ATM gave.

    Args:
        metric (`str`): what rounds were chosen by: `eval_average`, or `eval_loss` where there are no metrics.
        start (`dict`): all metrics of the model before the first round.
        rounds (`list[float]`): the chosen metric after each round.
        best_round (`int`): 1-based; 0 if no round was better than the start, whose weights the model then has again.
        stopped (`str`, *optional*): why tuning ended before its last round, if a loss or task vector diverged.
    """

    metric: str
    start: dict[str, float]
    rounds: list[float]
    best_round: int
    stopped: str | None = None

    @property
    def best(self) -> float:
        """The chosen metric of the model that was kept."""
        return self.rounds[self.best_round - 1] if self.best_round else self.start[self.metric]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {**dataclasses.asdict(self), "best": self.best}


def refine_arguments(args: ATMConfig, has_metrics: bool) -> ATMConfig:
    """A run's settings with what choosing a round needs: evaluation and a checkpoint at each round's end.

    Args:
        args ([`ATMConfig`]): the settings.
        has_metrics (`bool`): whether rounds can be chosen by the average metric, unless `metric_for_best_model` names
            another one; else by the average loss.
    """
    choice: dict[str, Any] = {
        **_CHOICE,
        "save_total_limit": args.save_total_limit or 1,
    }
    if args.metric_for_best_model is None:
        choice |= {"metric_for_best_model": "average" if has_metrics else "loss", "greater_is_better": has_metrics}
    return dataclasses.replace(args, **choice)


def refine(trainer: ATMTrainer, resume_from_checkpoint: str | bool | None = None) -> Refinement:
    """Post-hoc ATM (PH-ATM of https://huggingface.co/papers/2411.03055): rounds from the model as it is.

    The model may come from any merge. Rounds are chosen on `eval_dataset`, which should share no example with
    `train_dataset`; see [`split_for_refining`]. The model ends as the best of all rounds and the start, so on that
    data it is never worse than before. Where a round diverges, those before it stand.

    Args:
        trainer ([`ATMTrainer`]): with settings from [`refine_arguments`] and the merged model.
        resume_from_checkpoint (`str` or `bool`, *optional*): as for [`ATMTrainer.train`].

    Raises:
        ValueError: when the settings do not keep the best round.
    """
    args = trainer.args
    if not args.load_best_model_at_end:
        raise ValueError("refine keeps the best round; build the trainer with refine_arguments(args, has_metrics).")
    model: Any = trainer.model
    # The model as it came: prototypes that it brings may be of more samples than there are here.
    heads = [prototypical_head(model, task) for task in trainer.atm.datasets]
    trainer.atm.prototypes_held = all(head is None or bool(head.fitted) for head in heads)
    start = {name: value for name, value in trainer.evaluate().items() if name not in ("epoch", "eval_runtime")}
    start_state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    trainer.atm.prototypes_held = False
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if metric not in start:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured; there are {sorted(start)}."
        )
    stopped = None
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except DivergenceError as error:
        # The rounds before are worth as much as they were.
        stopped = str(error)
        if trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        trainer.atm.end_training(trainer.state)
    rounds = [record["metrics"][metric] for record in trainer.report]
    # What is no number is worse than anything.
    worst = -math.inf if args.greater_is_better else math.inf
    values = [value if math.isfinite(value) else worst for value in (start[metric], *rounds)]
    best = (max if args.greater_is_better else min)(values)
    best_round = values.index(best)
    if best_round == 0:
        with torch.no_grad():
            model.load_state_dict(start_state)
        trainer.atm.prototypes_held = True
        # Experts that are kept for export belong to a model that is gone.
        trainer.atm.rounds.merged_vectors = {}
    return Refinement(metric, start, rounds, best_round, stopped)


def split_for_refining(
    datasets: Mapping[str, Any], share: float = 1.0, holdout: float = 0.2, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shuffles each data set and cuts it into examples to tune on and examples to choose the best round on.

    Args:
        datasets (`Mapping[str, Dataset]`): a Hugging Face data set per task.
        share (`float`, *optional*, defaults to 1.0): fraction of the examples used at all, in (0, 1].
        holdout (`float`, *optional*, defaults to 0.2): fraction of those that chooses the round, in [0, 1); with 0
            only the first part is made.
        seed (`int`, *optional*, defaults to 0): decides the order.

    Returns:
        `tuple[dict, dict]`: data to tune on and data to choose on, by task.

    Raises:
        ValueError: when a fraction is out of range, or a part would be empty.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must lie in (0, 1].")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; it must lie in [0, 1).")
    tune, choose = {}, {}
    for task, dataset in datasets.items():
        size = round(share * len(dataset))
        held = round(holdout * size)
        if size - held < 1 or (holdout and held < 1):
            raise ValueError(
                f"Task {task!r} has {len(dataset)} examples, too few for share={share} and holdout={holdout}; raise "
                "the share or give it more data."
            )
        shuffled = dataset.shuffle(seed=seed)
        tune[task] = shuffled.select(range(held, size))
        if held:
            choose[task] = shuffled.select(range(held))
    return tune, choose
