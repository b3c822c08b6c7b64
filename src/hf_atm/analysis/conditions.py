"""What the theory of alternating tuning and merging asks of a round, measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..geometry import cosine


def size_loss_covariance(sizes: Mapping[str, int], losses: Mapping[str, float]) -> float:
    """
    Covariance of data set size and loss over tasks, divided by the mean size.

    It is the pooled loss, every example counting once, minus the mean of the tasks' losses. The latter, which ATM with
    equal weights lowers, bounds the former from above exactly when this is at most zero
    (https://huggingface.co/papers/2411.03055).

    Args:
        sizes (`Mapping[str, int]`):
            Examples per task, at least one of them positive.
        losses (`Mapping[str, float]`):
            Loss of the same tasks, each a mean over its examples.

    Returns:
        `float`: in units of the loss.
    """
    tasks = sorted(losses)
    mean_size = sum(sizes[task] for task in tasks) / len(tasks)
    mean_loss = sum(losses[task] for task in tasks) / len(tasks)
    return sum((sizes[task] - mean_size) * (losses[task] - mean_loss) for task in tasks) / len(tasks) / mean_size


def gradient_identity(task_vector: Tensor, gradient: Tensor, learning_rate: float) -> tuple[float, float] | None:
    """
    How far a task vector is from `-learning_rate * gradient`, which it equals after one step of gradient descent.

    Args:
        task_vector, gradient (`Tensor`):
            Of the same shape; the gradient where tuning started.
        learning_rate (`float`):
            Sum over the steps taken.

    Returns:
        `tuple[float, float]`: the cosine between the two, in [-1, 1], and the distance relative to the task vector's
        norm, at least 0. `None` for a zero task vector.
    """
    vector, descent = task_vector.double(), gradient.double() * -learning_rate
    norm = float(torch.linalg.vector_norm(vector))
    if not norm:
        return None
    return cosine(vector, descent), float(torch.linalg.vector_norm(vector - descent)) / norm
