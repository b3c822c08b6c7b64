from __future__ import annotations

import math
import warnings

import evaluate
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from hf_atm.metrics import (
    GLUE_METRICS,
    build_compute_metrics,
    check_metrics,
    compute_causal_lm_metrics,
    higher_is_better,
    list_metrics,
    load_metric,
    preprocess_causal_lm_logits,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def compute(name, predictions, references, **kwargs):
    result = load_metric(name).compute(predictions=predictions, references=references, **kwargs)
    assert list(result) == [name]
    assert isinstance(result[name], float)
    return result[name]


def test_hand_values():
    assert compute("accuracy", [1, 0, 2, 2], [1, 1, 2, 0]) == 0.5
    # Label 1: precision 2/3, recall 2/4, hence 2 * 2 / (3 + 4).
    assert compute("f1", [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]) == pytest.approx(4 / 7, abs=1e-12)
    # One true positive and negative, one false positive, no false negative: (1*1 - 1*0) / sqrt(2*1*2*1).
    assert compute("matthews_correlation", [1, 1, 0], [1, 0, 0]) == pytest.approx(0.5, abs=1e-12)
    assert compute("pearsonr", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0, abs=1e-12)
    assert compute("spearmanr", [1.0, 10.0, 100.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0, abs=1e-12)
    assert compute("mse", [1.0, 2.0], [1.0, 5.0]) == 4.5


def test_against_sklearn_and_scipy():
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    for average in ("macro", "micro", "weighted"):
        expected = sklearn_metrics.f1_score(references, predictions, average=average)
        assert compute(f"f1_{average}", predictions, references) == pytest.approx(expected, abs=1e-12)
        assert compute("f1", predictions, references, average=average) == pytest.approx(expected, abs=1e-12)
    expected = sklearn_metrics.matthews_corrcoef(references, predictions)
    assert compute("matthews_correlation", predictions, references) == pytest.approx(expected, abs=1e-12)
    x, y = generator.normal(size=200), generator.normal(size=200).round(1)
    assert compute("pearsonr", x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert compute("spearmanr", x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert compute("mse", x, y) == pytest.approx(sklearn_metrics.mean_squared_error(y, x), abs=1e-12)


@pytest.mark.parametrize("name", ["pearsonr", "spearmanr", "matthews_correlation"])
@pytest.mark.parametrize(
    ("predictions", "references"), [([1, 1, 1], [0, 1, 2]), ([0, 1, 2], [1, 1, 1]), ([1, 1], [0, 0]), ([1], [1])]
)
def test_undefined_correlation_is_zero_without_a_warning(name, predictions, references):
    assert compute(name, predictions, references) == 0.0


def test_nearly_constant_predictions_do_not_warn():
    assert -1 <= compute("pearsonr", [1.0, 1.0 + 1e-15, 1.0], [0.0, 1.0, 2.0]) <= 1


def test_f1_without_a_positive_is_zero():
    assert compute("f1", [0, 0], [0, 0]) == 0.0
    assert compute("f1", [0, 0], [1, 1]) == 0.0


def test_divergence_is_nan_and_not_a_low_score():
    for name in ("pearsonr", "spearmanr", "mse"):
        assert math.isnan(compute(name, [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]))
    logits = np.array([[0.0, math.nan], [1.0, 0.0]])
    assert math.isnan(build_compute_metrics(["accuracy"])(EvalPrediction(logits, np.array([0, 0])))["accuracy"])


def test_metrics_belong_to_evaluate_and_combine():
    assert all(isinstance(load_metric(name), evaluate.Metric) for name in list_metrics())
    combined = evaluate.combine([load_metric("accuracy"), load_metric("f1")])
    combined.add_batch(predictions=[1, 0], references=[1, 1])
    assert combined.compute() == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}


def test_compute_metrics_of_logits():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    function = build_compute_metrics(["f1", "accuracy"])
    labels = np.array([0, 1, 1])
    expected = {"f1": pytest.approx(2 / 3), "accuracy": pytest.approx(2 / 3)}
    assert function(EvalPrediction(logits, labels)) == expected
    assert list(function(EvalPrediction(logits, labels))) == ["f1", "accuracy"]
    assert function(EvalPrediction((logits, np.zeros(3)), labels)) == expected
    assert function(EvalPrediction(logits, labels)) == expected


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_compute_metrics_of_a_regression(shape):
    function = build_compute_metrics(["pearsonr", "mse"], regression=True)
    result = function(EvalPrediction(np.array([1.0, 2.0, 3.0], dtype=np.float32).reshape(shape), np.array([1, 2, 6])))
    assert result["mse"] == 3.0
    assert result["pearsonr"] == pytest.approx(stats.pearsonr([1, 2, 3], [1, 2, 6])[0])


def test_glue_metrics_are_valid():
    assert len(GLUE_METRICS) == 11
    for name, metrics in GLUE_METRICS.items():
        check_metrics(metrics, regression=name == "stsb", num_labels=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["bleu"], False), KeyError, "unknown metric 'bleu'; known metrics: accuracy, f1, f1_macro"),
        (([], False), ValueError, "no metric given"),
        ((["pearsonr"], False), ValueError, "does not suit labels that are classes; choose from accuracy"),
        ((["accuracy"], True), ValueError, "does not suit labels that are numbers; choose from mse, pearsonr"),
        ((["mse", "pearsonr"], True), ValueError, "'mse' cannot come first"),
        ((["accuracy", "f1"], False, 3), ValueError, "'f1' is for two labels and there are 3"),
    ],
)
def test_bad_metrics(arguments, error, message):
    with pytest.raises(error, match=message):
        check_metrics(*arguments)


def test_unknown_metric_lists_the_known():
    with pytest.raises(KeyError, match="unknown metric 'rouge'.*matthews_correlation"):
        load_metric("rouge")
    assert not higher_is_better("mse")
    assert higher_is_better("accuracy")


def test_causal_lm_metrics():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[1, 3:] = -100
    scores = preprocess_causal_lm_logits((logits, None), labels)
    assert scores.shape == (3, 5, 2)
    result = compute_causal_lm_metrics(EvalPrediction(scores.numpy(), labels.numpy()))
    shifted, targets = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(shifted, targets, ignore_index=-100)
    kept = targets != -100
    assert result["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-6)
    assert result["token_accuracy"] == pytest.approx((shifted.argmax(-1) == targets)[kept].float().mean().item())
    assert next(iter(result)) == "token_accuracy"
    nothing = compute_causal_lm_metrics(EvalPrediction(scores.numpy(), np.full((3, 5), -100)))
    assert math.isnan(nothing["perplexity"])
