"""A task's head without a classifier: classes are the means of their samples' features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .fewshot.heads import check_scale, class_means, prototype_logits
from .task_modules import pooled_features


class PrototypicalTaskHead(nn.Module):
    """Classifies by distance to each class's prototype, the mean of its features (https://huggingface.co/papers/1703.05175).

    Training goes by episodes, whose prototypes are those of their own support; all that is learned here is the scale of
    the distances. Any other batch is classified by the prototypes of all classes, buffers that
    [`refresh_prototypes`] computes from the training data and that are saved with the model.

    Args:
        width (`int`): Width of the features.
        num_labels (`int`): Classes of the task, at least 2.
        n_way (`int`, *optional*): Classes per episode; all of them by default.
        k_shot (`int`, *optional*, defaults to 1): Support samples of each class in an episode.
        n_query (`int`, *optional*, defaults to 1): Query samples of each class in an episode.
        scale (`float` or `"auto"`, *optional*, defaults to `"auto"`): First value of the factor on the distances. Auto:
            10 over their mean on the training data (cosines: 10).
        distance (`str`, *optional*, defaults to `"sqeuclidean"`): Or `"cosine"`.

    Raises:
        ValueError: If `distance` or `scale` is unusable.
    """

    prototypes: torch.Tensor
    calibrated: torch.Tensor
    fitted: torch.Tensor

    def __init__(
        self,
        width: int,
        num_labels: int,
        n_way: int | None = None,
        k_shot: int = 1,
        n_query: int = 1,
        scale: float | str = "auto",
        distance: str = "sqeuclidean",
    ) -> None:
        super().__init__()
        check_scale(scale, distance)
        self.n_way, self.k_shot, self.n_query = n_way or num_labels, k_shot, n_query
        self.start = 10.0 if scale == "auto" and distance == "cosine" else scale
        self.distance = distance
        # A logarithm: a step changes the scale by a share of it, whatever the features' size, and never its sign.
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("prototypes", torch.zeros(num_labels, width))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("fitted", torch.tensor(False))
        self._recorded: list[torch.Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The scale as it starts, and no prototypes."""
        self.log_scale.fill_(0.0 if isinstance(self.start, str) else math.log(self.start))
        self.calibrated.fill_(not isinstance(self.start, str))
        self.fitted.fill_(False)
        self.prototypes.zero_()

    def forward(self, features: torch.Tensor, episodes: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """Logits, and the loss of episodes.

        Args:
            features (`torch.Tensor` of shape `(samples, width)`): Of the batch's samples.
            episodes (`torch.Tensor` of shape `(episodes, n_way, k_shot + n_query)`, *optional*): Which sample is where
                in each episode, int64, support first.

        Returns:
            `SequenceClassifierOutput`: Of episodes, `logits` of their queries, `(episodes, n_way * n_query, n_way)` class
            after class, and the mean `loss`. Otherwise `logits` of the samples, `(samples, num_labels)`.

        Raises:
            ValueError: If there are no prototypes yet.
        """
        if self._recorded is not None:
            self._recorded.append(features.detach())
            return SequenceClassifierOutput(logits=features.new_zeros(len(features), len(self.prototypes)))
        if episodes is None:
            if not self.fitted:
                raise ValueError(
                    "a prototypical head has no prototypes yet; train it with ATMTrainer, or call "
                    "refresh_prototypes(model, task, dataset, collator)"
                )
            return SequenceClassifierOutput(logits=self._logits(features, self.prototypes))
        drawn = features[episodes]
        support, query = drawn[:, :, : self.k_shot], drawn[:, :, self.k_shot :]
        classes = torch.arange(drawn.shape[1], device=features.device)
        prototypes = class_means(support.flatten(1, 2), classes.repeat_interleave(self.k_shot), len(classes))
        if not self.calibrated:
            self.calibrate(query.flatten(1, 2)[:1], prototypes[:1])
        logits = self._logits(query.flatten(1, 2), prototypes)
        labels = classes.repeat_interleave(query.shape[2]).repeat(len(drawn))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels), logits=logits)

    def _logits(self, features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        return prototype_logits(features, prototypes, self.log_scale.exp(), self.distance)

    @torch.no_grad()
    def calibrate(self, features: torch.Tensor, prototypes: torch.Tensor) -> None:
        """Sets the scale to 10 over the mean squared distance of features and prototypes."""
        mean = -prototype_logits(features, prototypes, 1.0).mean()
        # Samples that are all the same have no distance to go by.
        self.log_scale.copy_(torch.log(10 / mean.double().clamp_min(1e-30)))
        self.calibrated.fill_(True)

    @torch.no_grad()
    def fit(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes each class's mean as its prototype, and calibrates the scale if that is still to be done.

        Args:
            features (`torch.Tensor` of shape `(samples, width)`): Of training samples.
            labels (`torch.Tensor` of shape `(samples,)`): Their classes; each class has to have a sample.

        Raises:
            ValueError: If a class has none.
        """
        absent = sorted(set(range(len(self.prototypes))) - set(labels.tolist()))
        if absent:
            raise ValueError(f"class {absent[0]} has no sample to make a prototype of; give it one, or leave it out")
        self.prototypes.copy_(class_means(features.double(), labels, len(self.prototypes)))
        self.fitted.fill_(True)
        if not self.calibrated:
            self.calibrate(features, self.prototypes)

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Within it the head keeps the features that it is given, and classifies nothing."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None


class PooledPrototypicalHead(PrototypicalTaskHead):
    """The same over a backbone's pooled features, as a [`MultiTaskModel`] has it.

    Args:
        pooling (`str`): See [`MultiTaskConfig`].
        width (`int`): Width of the features.
        spec (`dict`): The task's entry, checked by [`normalize_task`].
    """

    def __init__(self, pooling: str, width: int, spec: dict[str, Any]) -> None:
        names = ("num_labels", "n_way", "k_shot", "n_query", "scale", "distance")
        super().__init__(width, **{name: spec[name] for name in names})
        self.pooling = pooling

    def forward(  # type: ignore[override]
        self, backbone: PreTrainedModel, episodes: torch.Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        pooled, outputs = pooled_features(self.pooling, backbone, inputs)
        result = super().forward(pooled, episodes)
        result.hidden_states, result.attentions = outputs.get("hidden_states"), outputs.get("attentions")
        return result


def default_pooling(backbone: PreTrainedModel) -> str:
    """The pooling of prototypes where none is chosen: the mean of all places."""
    return "image_pool" if backbone.main_input_name == "pixel_values" else "mean"
