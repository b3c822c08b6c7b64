"""Batches of episodes: every sample is read and collated once, however many episodes it is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..seeding import derive_seed, isolated_rng
from .episodes import Episode


_LABELS = ("label", "labels", "label_ids")


class EpisodeCollator:
    """Turns a list of [`Episode`]s into one batch for a [`FewShotModel`].

    Args:
        item_collator (`Callable`, *optional*): Collates a list of samples into a mapping of tensors, such as
            `DataCollatorWithPadding`; may be `None` for a data set with a method `batch(rows)`, such as
            [`GraphDataset`].
        dataset (`Sequence`): The map-style data set that the episodes' rows refer to. Labels in its samples are
            dropped: an episode has its own.

    Returns:
        From a call, `dict`: `items`, the distinct samples collated; `index`, int64 `(episodes, N, K + Q)`, which of
        them each place of an episode is, support first; `k_shot`; and `seeds`, one per episode, for what else is random about it.
    """

    def __init__(self, item_collator: Callable | None, dataset: Any) -> None:
        if item_collator is None and not hasattr(dataset, "batch"):
            raise ValueError(
                f"{type(dataset).__name__} does not collate itself; pass an item_collator, such as "
                "transformers.default_data_collator."
            )
        self.item_collator = item_collator
        self.dataset = dataset

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        rows = np.stack([np.concatenate([episode.support, episode.query], axis=1) for episode in episodes])
        distinct, index = np.unique(rows, return_inverse=True)
        with isolated_rng(
            derive_seed("items", episodes[0].seed)
        ):  # a transform that draws does so alike in any process
            items = collate_rows(self.dataset, distinct, self.item_collator)
        return {
            "items": items,
            "index": torch.from_numpy(index.reshape(rows.shape).astype(np.int64)),
            "k_shot": episodes[0].support.shape[1],
            "seeds": [derive_seed("mixup", episode.seed) for episode in episodes],
        }


def collate_rows(dataset: Any, rows: Sequence[int] | np.ndarray, item_collator: Callable | None = None) -> Any:
    """Rows of a data set as one batch without labels.

    Args:
        dataset (`Sequence`): A map-style data set.
        rows (`Sequence[int]`): The rows, in the order wanted.
        item_collator (`Callable`, *optional*): See [`EpisodeCollator`].

    Returns:
        What the item collator makes of them.
    """
    if item_collator is None:
        return dataset.batch(rows)
    places = [int(row) for row in rows]
    fetch = getattr(dataset, "__getitems__", None)
    samples = [dataset[row] for row in places] if fetch is None else fetch(places)
    return item_collator([_without_labels(sample) for sample in samples])


def _without_labels(sample: Any) -> Any:
    if not isinstance(sample, Mapping):
        return sample
    return {name: value for name, value in sample.items() if name not in _LABELS}
