"""Metrics that need no network: `evaluate.Metric` subclasses over scikit-learn and SciPy.

`evaluate` ships no metric code of its own and fetches a script for every name, so it fails offline. The classes here
give the same numbers under the same names. Undefined values are settled once, and without warnings:

- a correlation (Pearson, Spearman, Matthews) with a constant side, or over fewer than two examples, is 0.0;
- an F1 whose precision and recall are both undefined is 0.0;
- a score over NaN or infinite predictions is NaN: a model that has diverged must not look like a poor one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


GLUE_METRICS: dict[str, list[str]] = {
    "cola": ["matthews_correlation"],
    "mnli": ["accuracy"],
    "mnli_matched": ["accuracy"],
    "mnli_mismatched": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "qnli": ["accuracy"],
    "qqp": ["accuracy", "f1"],
    "rte": ["accuracy"],
    "sst2": ["accuracy"],
    "stsb": ["pearsonr", "spearmanr"],
    "wnli": ["accuracy"],
}
"""Metrics of each GLUE task, the one that counts first. https://huggingface.co/papers/1804.07461"""

_LOWER_IS_BETTER = frozenset({"mse", "perplexity"})


class _LocalMetric(evaluate.Metric):
    """One named score over pairs of (prediction, reference)."""

    regression = False
    summary = ""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", True)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        kind = "float64" if self.regression else "int64"
        features = datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
        return evaluate.MetricInfo(description=self.summary, citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if not (np.all(np.isfinite(predictions)) and np.all(np.isfinite(references))):
            return {self.name: math.nan}
        return {self.name: float(self.score(predictions, references, **kwargs))}

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        raise NotImplementedError


class Accuracy(_LocalMetric):
    """Fraction of predictions equal to their reference, in [0, 1]."""

    name = "accuracy"
    summary = "Fraction of predictions equal to their reference."

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        return float(np.mean(predictions == references))


class F1(_LocalMetric):
    """F1 in [0, 1]; `average` is `"binary"` (the score of label 1), `"macro"`, `"micro"` or `"weighted"`."""

    name = "f1"
    summary = "Harmonic mean of precision and recall."
    average = "binary"

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        from sklearn.metrics import f1_score

        average = kwargs.pop("average", self.average)
        return float(f1_score(references, predictions, average=average, zero_division=0, **kwargs))


class F1Macro(F1):
    """Unweighted mean of the F1 of every label that occurs."""

    name = "f1_macro"
    average = "macro"


class F1Micro(F1):
    """F1 over the counts of all labels together; with one label per example it equals the accuracy."""

    name = "f1_micro"
    average = "micro"


class F1Weighted(F1):
    """Mean of the F1 of every label, weighted by the label's number of references."""

    name = "f1_weighted"
    average = "weighted"


class MatthewsCorrelation(_LocalMetric):
    """Matthews correlation in [-1, 1]; 0.0 when predictions or references are constant."""

    name = "matthews_correlation"
    summary = "Correlation of predicted and true labels, fair to rare labels."

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        from sklearn.metrics import matthews_corrcoef

        if _undefined(predictions, references):
            return 0.0
        return float(matthews_corrcoef(references, predictions))


class PearsonR(_LocalMetric):
    """Pearson correlation in [-1, 1]; 0.0 when predictions or references are constant."""

    name = "pearsonr"
    summary = "Linear correlation of predictions and references."
    regression = True

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        from scipy.stats import pearsonr

        return _correlation(pearsonr, predictions, references)


class SpearmanR(_LocalMetric):
    """Spearman rank correlation in [-1, 1]; 0.0 when predictions or references are constant."""

    name = "spearmanr"
    summary = "Linear correlation of the ranks of predictions and references."
    regression = True

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        from scipy.stats import spearmanr

        return _correlation(spearmanr, predictions, references)


class MeanSquaredError(_LocalMetric):
    """Mean squared difference, in squared units of the label; lower is better."""

    name = "mse"
    summary = "Mean squared difference of predictions and references."
    regression = True

    def score(self, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> float:
        return float(np.mean((predictions - references) ** 2))


_METRICS: dict[str, type[_LocalMetric]] = {
    cls.name: cls
    for cls in (Accuracy, F1, F1Macro, F1Micro, F1Weighted, MatthewsCorrelation, PearsonR, SpearmanR, MeanSquaredError)
}


def _undefined(predictions: np.ndarray, references: np.ndarray) -> bool:
    return len(predictions) < 2 or bool(np.all(predictions == predictions[0]) or np.all(references == references[0]))


def _correlation(function: Callable, predictions: np.ndarray, references: np.ndarray) -> float:
    if _undefined(predictions, references):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(function(predictions, references)[0])
    return 0.0 if math.isnan(value) else value


def list_metrics() -> list[str]:
    """Names that [`load_metric`] knows, sorted."""
    return sorted(_METRICS)


def higher_is_better(name: str) -> bool:
    """Whether a larger value of the metric `name` is a better one."""
    return name not in _LOWER_IS_BETTER


def load_metric(name: str, **kwargs: Any) -> evaluate.Metric:
    """Loads a metric by name, without a network.

    Args:
        name (`str`): One of [`list_metrics`].
        kwargs: Passed to `evaluate.Metric`.

    Returns:
        `evaluate.Metric`: its `compute(predictions=..., references=...)` gives `{name: value}`.

    Raises:
        KeyError: If the name is unknown; the message lists the known ones.

    Example:

    ```python
    >>> load_metric("accuracy").compute(predictions=[1, 0, 1], references=[1, 1, 1])["accuracy"]
    0.6666666666666666
    ```
    """
    if name not in _METRICS:
        raise KeyError(f"unknown metric {name!r}; known metrics: {', '.join(list_metrics())}")
    return _METRICS[name](**kwargs)


def check_metrics(names: Sequence[str], regression: bool, num_labels: int | None = None, task: str = "") -> None:
    """Checks that metrics exist, suit the kind of label, and that the first may stand in an average.

    Args:
        names (`Sequence[str]`): Metric names, the one that counts first.
        regression (`bool`): Whether the label is a number rather than a class.
        num_labels (`int`, *optional*): Number of classes; binary `f1` needs two.
        task (`str`, *optional*): Named in the messages.

    Raises:
        KeyError: If a name is unknown.
        ValueError: If the list is empty, a metric does not suit the labels, or the first is better when lower.
    """
    where = f"task {task!r}: " if task else ""
    if not names:
        raise ValueError(f"{where}no metric given; known metrics: {', '.join(list_metrics())}")
    for name in names:
        if name not in _METRICS:
            raise KeyError(f"{where}unknown metric {name!r}; known metrics: {', '.join(list_metrics())}")
        if _METRICS[name].regression != regression:
            fitting = ", ".join(n for n in list_metrics() if _METRICS[n].regression == regression)
            kind = "numbers" if regression else "classes"
            raise ValueError(f"{where}metric {name!r} does not suit labels that are {kind}; choose from {fitting}")
    if "f1" in names and num_labels not in (None, 2):
        raise ValueError(
            f"{where}metric 'f1' is for two labels and there are {num_labels}; choose f1_macro, f1_micro or f1_weighted"
        )
    if not higher_is_better(names[0]):
        raise ValueError(
            f"{where}metric {names[0]!r} cannot come first, because eval_average takes each task's first metric and a "
            "larger value must be a better one; put pearsonr or spearmanr before it"
        )


def build_compute_metrics(names: Sequence[str], regression: bool = False) -> Callable[[EvalPrediction], dict]:
    """Builds a `compute_metrics` function for the Trainer.

    Args:
        names (`Sequence[str]`): Metric names; they keep their order, and the first one enters `eval_average`.
        regression (`bool`, *optional*, defaults to `False`): Whether predictions are numbers `(n,)` or `(n, 1)`;
            otherwise they are logits `(n, num_labels)`, of which the largest decides.

    Returns:
        A function of `EvalPrediction` that gives `{name: float}`. Extra model outputs behind the logits are ignored.

    Raises:
        KeyError: If a name is unknown.
        ValueError: See [`check_metrics`].
    """
    check_metrics(names, regression)
    metrics = {name: load_metric(name) for name in names}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        if regression:
            predictions = logits.reshape(len(logits)).astype(np.float64)
            references = np.asarray(prediction.label_ids).reshape(len(logits)).astype(np.float64)
        elif not np.all(np.isfinite(logits)):
            return dict.fromkeys(metrics, math.nan)
        else:
            predictions, references = logits.argmax(axis=-1), np.asarray(prediction.label_ids)
        result: dict[str, float] = {}
        for metric in metrics.values():
            result.update(metric.compute(predictions=predictions, references=references))
        return result

    return compute_metrics


def preprocess_causal_lm_logits(logits: Any, labels: Any) -> Any:
    """Reduces a causal language model's logits to two numbers per token; pass as `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor`): `(batch, length, vocabulary)`, or a tuple that begins with it.
        labels (`torch.Tensor`): `(batch, length)`, -100 where a token does not count.

    Returns:
        `torch.Tensor`: `(batch, length, 2)`, fp32: of each label, its negative log-likelihood in nats and whether it
        was the likeliest token. The first position has no prediction and holds zeros.
    """
    import torch

    logits = logits[0] if isinstance(logits, tuple) else logits
    logits, targets = logits[:, :-1].float(), labels[:, 1:].clamp(min=0)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    correct = (logits.argmax(dim=-1) == targets).float()
    return torch.nn.functional.pad(torch.stack([nll, correct], dim=-1), (0, 0, 1, 0))


def compute_causal_lm_metrics(prediction: EvalPrediction) -> Mapping[str, float]:
    """Token accuracy, in [0, 1], and perplexity from the output of [`preprocess_causal_lm_logits`].

    Every token whose label is not -100 counts once, however long its sequence. The accuracy comes first, since it is
    the one that is better when larger. No token at all gives NaN.
    """
    labels = np.asarray(prediction.label_ids)[:, 1:]
    scores = np.asarray(prediction.predictions, dtype=np.float64)[:, 1:][labels != -100]
    if len(scores) == 0:
        return {"token_accuracy": math.nan, "perplexity": math.nan}
    with np.errstate(over="ignore"):
        return {"token_accuracy": float(scores[:, 1].mean()), "perplexity": float(np.exp(scores[:, 0].mean()))}
