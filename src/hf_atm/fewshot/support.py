"""A support set that stays with the model, for classifying samples one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .collating import collate_rows
from .encoders import EpisodeEncoder
from .episodes import labels_of
from .heads import class_means


class SupportMixin(PreTrainedModel):
    """The part of a [`FewShotModel`] that keeps a support set.

    Embeddings of the support are buffers and are saved with the model; which rows they came from, and the classes, are
    in `config.support`. They are those of the weights at that time: after any change of weights call
    [`refresh_prototypes`].
    """

    config: Any
    encoder: EpisodeEncoder
    head: nn.Module
    conditioning: Any

    def _init_support(self) -> None:
        self._keep(torch.zeros(len(self.config.support["rows"]), self.encoder.embedding_dim, 2))

    def _keep(self, embeddings: torch.Tensor) -> None:
        """`embeddings` is `(rows, d, 2)`: unconditioned, which conditions, and conditioned, which is compared with."""
        self.register_buffer("support_embeddings", embeddings)

    @torch.no_grad()
    def set_support(
        self, dataset: Any, rows: Sequence[int] | np.ndarray | None = None, item_collator: Callable | None = None
    ) -> None:
        """Learns classes from a few labelled samples, any number of each.

        Args:
            dataset: A map-style data set with labels.
            rows (`Sequence[int]`, *optional*): The support; all rows by default.
            item_collator (`Callable`, *optional*): See [`EpisodeCollator`].

        Raises:
            ValueError: For fewer than two classes, or an encoder whose embeddings depend on their batch.
        """
        if self.encoder.per_episode:
            raise ValueError(
                f"{type(self.encoder).__name__} gives no embedding of its own to each sample, so none can be "
                "classified alone; use norm='graph'."
            )
        labels = labels_of(dataset)
        chosen = list(range(len(labels))) if rows is None else [int(row) for row in rows]
        classes = sorted({int(label) for label in labels[chosen]})
        if len(classes) < 2:
            raise ValueError(f"the support holds {len(classes)} class(es); give samples of at least 2.")
        self.config.support = {
            "rows": chosen,
            "labels": [classes.index(int(label)) for label in labels[chosen]],
            "classes": classes,
        }
        self.refresh_prototypes(dataset, item_collator)
        if getattr(self.head, "pending", False):
            # By the support, or the first batch to be classified would decide.
            support = self.get_buffer("support_embeddings")[..., 1]
            head: Any = self.head
            head.calibrate(support, class_means(support, self._support_labels()))

    @torch.no_grad()
    def refresh_prototypes(self, dataset: Any, item_collator: Callable | None = None) -> None:
        """Embeds the support anew, after the weights have changed.

        Args:
            dataset: The data set given to [`set_support`].
            item_collator (`Callable`, *optional*): Likewise.

        Raises:
            ValueError: If there is no support yet.
        """
        labels = self._support_labels()
        training = self.training
        self.eval()
        items = collate_rows(dataset, self.config.support["rows"], item_collator)
        items = {name: value.to(self.device) for name, value in items.items()}
        plain = self.encoder(items)
        self._keep(torch.stack([plain, plain], dim=-1))
        film, groups = self._support_film(labels, len(plain))
        if film is not None:
            self._keep(torch.stack([plain, self.encoder(items, film, groups)], dim=-1))
        self.train(training)

    def forget_support(self) -> None:
        """Drops the support set."""
        self.config.support = None
        self._buffers.pop("support_embeddings", None)

    def classify_items(self, items: Any) -> torch.Tensor:
        """Logits of samples by the support set.

        Args:
            items: A batch of `n` items, as the item collator made it.

        Returns:
            `torch.Tensor` of shape `(n, classes)`, in the order of `config.support["classes"]`.

        Raises:
            ValueError: If there is no support yet.
        """
        labels = self._support_labels()
        count = len(items["ptr"]) - 1 if "ptr" in items else len(next(iter(items.values())))
        film, groups = self._support_film(labels, count)
        query = self.encoder(items, film, groups)
        return self.head(query, self.get_buffer("support_embeddings")[..., 1], labels)

    def _support_labels(self) -> torch.Tensor:
        if not self.config.support:
            raise ValueError("the model has no support set; call set_support(dataset) first.")
        return torch.tensor(self.config.support["labels"], device=self.device)

    def _support_film(self, labels: torch.Tensor, count: int) -> Any:
        if self.conditioning is None:
            return None, None
        prototypes = class_means(self.get_buffer("support_embeddings")[..., 0], labels)
        film = self.conditioning(prototypes.unsqueeze(0).to(self.dtype))
        return film, torch.zeros(count, dtype=torch.long, device=self.device)
