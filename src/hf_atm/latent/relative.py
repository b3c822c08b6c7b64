"""Relative representations: a sample as its cosines to anchors (https://huggingface.co/papers/2209.15430)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ids import as_ids, named, repeated
from .spaces import EmbeddingSet


CHUNK = 8192


def row_norms(embeddings: Tensor, ids: Any = None, name: str = "") -> Tensor:
    """
    Lengths of rows, float64, squares summed in float64.

    Args:
        embeddings (`Tensor`):
            `(n, width)`.
        ids (`np.ndarray`, *optional*):
            Names the rows in errors, by default their numbers.
        name (`str`, *optional*):
            Whose rows they are.

    Raises:
        `ValueError`: for zero rows, which have no direction.
    """
    # In parts, since each is copied into float64.
    parts = embeddings.split(CHUNK)
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
    if bool((norms == 0).any()):
        wrong = torch.nonzero(norms == 0)[:, 0].numpy()
        raise ValueError(
            f"{name or 'The space'} is zero at the {'rows' if ids is None else 'ids'} "
            f"{named(wrong if ids is None else ids[wrong])}, where a cosine means nothing; leave these samples out."
        )
    return norms


def unit_rows(embeddings: Tensor, ids: Any = None, name: str = "") -> Tensor:
    """Rows scaled to length 1, float32, however long or short they were; see [`row_norms`]."""
    norms = row_norms(embeddings, ids, name)[:, None]
    # Lengths that float32 cannot hold, or holds with few digits, are rare.
    plain = not norms.numel() or 1e-30 < float(norms.min()) <= float(norms.max()) < 1e30
    return embeddings.float() / norms.float() if plain else (embeddings / norms).float()


class RelativeProjector:
    """
    Maps one space to cosines to its anchors. Rotating or rescaling the space changes nothing.

    Args:
        anchors (`Sequence[int]` or `Sequence[str]`):
            Ids of m samples, at least two, each once; they become the columns, in this order.
        standardize (`bool`, *optional*, defaults to `False`):
            Bring every dimension to mean 0 and variance 1 over the fitted rows first. Rotations then matter.

    Raises:
        `ValueError`: for fewer than two anchors, or repeated ones.
    """

    def __init__(self, anchors: Any, standardize: bool = False) -> None:
        self.anchors = as_ids(anchors, "anchors")
        self.standardize = standardize
        if len(self.anchors) < 2:
            raise ValueError(f"{len(self.anchors)} anchors were given; relative coordinates need at least two.")
        twice = repeated(self.anchors)
        if len(twice):
            raise ValueError(f"The anchors {named(twice)} occur more than once; each gives one column.")
        self.directions: Tensor | None = None

    def fit(self, embedding_set: EmbeddingSet, ids: Any = None) -> RelativeProjector:
        """
        Take the anchors' directions from a space.

        Args:
            embedding_set ([`EmbeddingSet`]):
                The space.
            ids (`Sequence`, *optional*):
                Samples whose mean and variance standardise, so that those to be scored are left out; all by default.

        Raises:
            `KeyError`: when it lacks anchors, or one of `ids`.
            `ValueError`: when an anchor is zero.
        """
        rows = torch.from_numpy(embedding_set.positions(self.anchors))
        embeddings = embedding_set.embeddings
        self.mean = self.scale = None
        if self.standardize:
            fitted = embeddings if ids is None else embeddings[torch.from_numpy(embedding_set.positions(ids))]
            variance, mean = torch.var_mean(fitted.double(), dim=0, correction=0)
            # A dimension without any spread stays at 0.
            self.mean, self.scale = mean, variance.sqrt().where(variance > 0, 1.0)
        self.directions = unit_rows(self._prepared(embeddings[rows]), self.anchors, embedding_set.name)
        return self

    def transform(self, embeddings: Tensor, chunk_size: int = CHUNK) -> Tensor:
        """
        Cosines of rows to the anchors.

        Args:
            embeddings (`Tensor`):
                `(N, width)`, of the width of the fitted set.
            chunk_size (`int`, *optional*, defaults to 8192):
                Rows handled at once; more take more memory.

        Returns:
            `Tensor`: `(N, m)`, float32, within [-1, 1].

        Raises:
            `ValueError`: before `fit`, for another width, and for zero rows.
        """
        if self.directions is None:
            raise ValueError("This projector knows no anchors yet; call fit(embedding_set) first.")
        width = self.directions.shape[1]
        if embeddings.dim() != 2 or embeddings.shape[1] != width:
            raise ValueError(
                f"These embeddings have shape {tuple(embeddings.shape)}, and the projector was fitted to a width of "
                f"{width}; fit one projector per space."
            )
        result = torch.empty(len(embeddings), len(self.directions))
        for start in range(0, len(embeddings), chunk_size):
            rows = unit_rows(self._prepared(embeddings[start : start + chunk_size].detach().cpu()))
            torch.mm(rows, self.directions.T, out=result[start : start + chunk_size])
        return result.clamp_(-1, 1)

    def _prepared(self, embeddings: Tensor) -> Tensor:
        if self.mean is None or self.scale is None:
            return embeddings.float()
        return ((embeddings.double() - self.mean) / self.scale).float()
