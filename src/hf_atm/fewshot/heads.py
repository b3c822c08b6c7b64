"""Heads without weights of their own: a class is the mean of its support, or the support itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


HEADS = ("matching", "prototypical")
DISTANCES = ("cosine", "sqeuclidean")


def class_means(support: torch.Tensor, labels: torch.Tensor, num_classes: int | None = None) -> torch.Tensor:
    """Prototypes: the mean embedding of every class, https://huggingface.co/papers/1703.05175.

    Args:
        support (`torch.Tensor` of shape `(..., S, d)`): Embeddings.
        labels (`torch.Tensor` of shape `(S,)` or `(..., S)`): Classes from 0; one row serves all episodes.
        num_classes (`int`, *optional*): Known beforehand, it saves a look at the labels.

    Returns:
        `torch.Tensor` of shape `(..., num_classes, d)`, fp32 or better.

    Raises:
        ValueError: If a class has no support, or the labels are not one per sample.
    """
    members = _members(support, labels, num_classes, "support")
    return members @ _at_least_float(support) / members.sum(-1, keepdim=True)


def _at_least_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _members(samples: torch.Tensor, labels: torch.Tensor, num_classes: int | None, what: str) -> torch.Tensor:
    """Which sample is in which class, as 0 and 1 of shape `(..., num_classes, S)`."""
    if labels.shape[-1] != samples.shape[-2]:
        raise ValueError(f"{samples.shape[-2]} {what} samples and {labels.shape[-1]} labels; give each sample one.")
    known = num_classes is not None
    num_classes = num_classes if num_classes is not None else int(labels.max()) + 1
    members = F.one_hot(labels, num_classes).transpose(-1, -2)
    if not known:
        empty = (members.sum(-1) == 0).reshape(-1, num_classes).any(0).nonzero()
        if len(empty):
            raise ValueError(f"class {int(empty[0])} has no {what}; number the classes from 0 without gaps.")
    return members.to(torch.promote_types(samples.dtype, torch.float32))


def prototype_logits(
    query: torch.Tensor, prototypes: torch.Tensor, scale: torch.Tensor | float, distance: str = "sqeuclidean"
) -> torch.Tensor:
    """`-scale * |z - c|^2`, or `scale * cos(z, c)`, of shape `(..., Q, N)`, fp32 or better.

    Args:
        query (`torch.Tensor` of shape `(..., Q, d)`): Embeddings.
        prototypes (`torch.Tensor` of shape `(..., N, d)`): One per class.
        scale (`torch.Tensor` or `float`): Inverse temperature.
        distance (`str`, *optional*, defaults to `"sqeuclidean"`): Or `"cosine"`.

    Raises:
        ValueError: If the widths differ.
    """
    if query.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"query and support have {query.shape[-1]} and {prototypes.shape[-1]} dimensions; embed both alike."
        )
    query = _at_least_float(query)
    if distance == "cosine":
        return scale * F.normalize(query, dim=-1) @ F.normalize(prototypes, dim=-1).transpose(-1, -2)
    # Differences first: expanding the square would lose what is common to all embeddings.
    return -scale * (query.unsqueeze(-2) - prototypes.unsqueeze(-3)).square().sum(-1)


def check_scale(scale: Any, distance: Any) -> None:
    """Refuses what cannot be the scale, or the name, of a distance.

    Raises:
        ValueError: Naming it.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance is {distance!r}; known: {', '.join(DISTANCES)}.")
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale != "auto" and not (number and scale > 0):
        raise ValueError(f"scale is {scale!r}; use a number above 0, or 'auto'.")


class PrototypicalHead(nn.Module):
    """Classifies by distance to the mean of each class's support, https://huggingface.co/papers/1703.05175.

    Args:
        scale (`float` or `"auto"`, *optional*, defaults to 7.5): First value of the learnable inverse temperature.
            `"auto"` is 10 over the mean squared distance (1 over it for the cosine: 10) in the first episode seen.
        distance (`str`, *optional*, defaults to `"sqeuclidean"`): Or `"cosine"`.
    """

    calibrated: torch.Tensor

    def __init__(self, scale: float | str = 7.5, distance: str = "sqeuclidean") -> None:
        super().__init__()
        check_scale(scale, distance)
        if scale == "auto" and distance == "cosine":
            scale = 10.0
        self.distance = distance
        self.scale = nn.Parameter(torch.tensor(1.0 if scale == "auto" else float(scale)))
        self.register_buffer("calibrated", torch.tensor(scale != "auto"))
        # Mirrored outside the tensor, so that a step does not wait for the device.
        self.pending = scale == "auto"
        self.register_load_state_dict_post_hook(_refresh)

    def refresh(self) -> None:
        """Looks whether the scale is set, after weights were loaded."""
        self.pending = self.calibrated.device.type != "meta" and not bool(self.calibrated)

    def forward(self, query: torch.Tensor, support: torch.Tensor, support_labels: torch.Tensor) -> torch.Tensor:
        """Logits of queries.

        Args:
            query (`torch.Tensor` of shape `(..., Q, d)`): Embeddings to classify, any number of episodes at once.
            support (`torch.Tensor` of shape `(..., S, d)`): Embeddings that define the classes.
            support_labels (`torch.Tensor` of shape `(S,)` or `(..., S)`): Their classes, 0 to N - 1.

        Returns:
            `torch.Tensor` of shape `(..., Q, N)`, fp32 or better.
        """
        return self.classify(query, class_means(support, support_labels))

    def classify(self, query: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """As `forward`, with the prototypes `(..., N, d)` known."""
        if self.pending:
            self.calibrate(query, prototypes)
        return prototype_logits(query, prototypes, self.scale, self.distance)

    @torch.no_grad()
    def calibrate(self, query: torch.Tensor, prototypes: torch.Tensor) -> None:
        """Sets the scale from the first of the episodes given."""
        one = -prototype_logits(query, prototypes, 1.0).reshape(-1, *query.shape[-2:-1], prototypes.shape[-2])[0]
        # Samples that are all the same have no distance to go by.
        self.scale.fill_((10 / one.mean().double().clamp_min(1e-30)).clamp_max(1e30))
        self.calibrated.fill_(True)
        self.pending = False


def _refresh(head: PrototypicalHead, incompatible_keys: object) -> None:
    head.refresh()


class MatchingHead(nn.Module):
    """Classifies by attention over the support samples, https://huggingface.co/papers/1606.04080.

    Args:
        scale (`float`, *optional*, defaults to 10.0): First value of the learnable factor on the cosines.
    """

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        if not (isinstance(scale, (int, float)) and scale > 0):
            raise ValueError(f"scale is {scale!r}; use a number above 0.")
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, query: torch.Tensor, support: torch.Tensor, support_labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, with the shapes of [`PrototypicalHead`]."""
        members = _members(support, support_labels, None, "support")
        attention = prototype_logits(query, _at_least_float(support), self.scale, "cosine").log_softmax(-1)
        # (..., Q, 1, S) beside (..., 1, N, S): a sample of another class weighs nothing.
        return torch.logsumexp(attention.unsqueeze(-2) + members.log().unsqueeze(-3), dim=-1)
