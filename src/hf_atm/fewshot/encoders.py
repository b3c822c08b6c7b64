"""Encoders: from a batch of items to one embedding each, with places that an episode may scale and shift."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..multi_task_config import POOLINGS
from ..task_modules import feature_width, fitting_inputs, mask_positions, pool_hidden


#: Scales and shifts of every episode, each `(episodes, places, dim)`.
Film = tuple[torch.Tensor, torch.Tensor]


class EpisodeEncoder(nn.Module):
    """Base class of encoders; derive from it to use a model of your own.

    Attributes:
        embedding_dim: width of the embeddings.
        num_film_layers: places that [`TaskConditioning`] scales and shifts; 0 if there are none.
        per_episode: whether an item's embedding depends on its episode even without conditioning.
        settings: what the constructor took, if a saved model may be built from it.
    """

    embedding_dim: int
    num_film_layers: int = 0
    per_episode: bool = False
    settings: dict[str, Any] | None = None

    def forward(self, items: Any, film: Film | None = None, groups: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds items.

        Args:
            items: A batch of `n` items, as the item collator made it.
            film (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Scales and shifts by episode.
            groups (`torch.Tensor` of shape `(n,)`, *optional*): Which episode each item is in; comes with `film`, and
                always if `per_episode` is set.

        Returns:
            `torch.Tensor` of shape `(n, embedding_dim)`.
        """
        raise NotImplementedError

    def select(self, items: Any, rows: torch.Tensor) -> Any:
        """The given items of a batch; by default rows of every tensor in it."""
        return {name: value.index_select(0, rows) for name, value in items.items()}

    def apply_film(self, hidden: torch.Tensor, film: Film | None, layer: int, owner: Any) -> torch.Tensor:
        """`gamma * hidden + beta` of one place, `owner` being the episode of every row of `hidden`."""
        if film is None:
            return hidden
        gammas, betas = (part[:, layer].to(hidden.dtype)[owner] for part in film)
        return torch.addcmul(betas, gammas, hidden)


class PooledEncoder(EpisodeEncoder):
    """A transformers text or vision backbone and its pooled output.

    Conditioning scales and shifts the output of every layer and the pooled embedding.

    Args:
        backbone ([`PreTrainedModel`]): The backbone; trained along.
        pooling (`str`, *optional*, defaults to `"mean"`): `"cls"`, `"mean"`, `"last_token"`, `"pooler"` or
            `"image_pool"`, as in [`MultiTaskConfig`].
        embedding_dim (`int`, *optional*): Width of the pooled output, where the configuration does not tell it.
    """

    def __init__(self, backbone: Any, pooling: str = "mean", embedding_dim: int | None = None) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; known: {', '.join(POOLINGS)}.")
        width = embedding_dim or feature_width(backbone.config)
        if width is None:
            raise ValueError(f"{type(backbone.config).__name__} does not tell its width; set embedding_dim.")
        self.backbone, self.pooling, self.embedding_dim = backbone, pooling, int(width)
        self.settings = {"pooling": pooling, "embedding_dim": embedding_dim}
        self._accepted = frozenset(inspect.signature(type(backbone).forward).parameters)
        self.num_film_layers = len(self._layers()) + 1 if self._layers() else 0

    def _layers(self) -> list[nn.Module]:
        depth = getattr(self.backbone.config.get_text_config(), "num_hidden_layers", None)
        lists = (module for module in self.backbone.modules() if isinstance(module, nn.ModuleList))
        return next((list(layers) for layers in lists if len(layers) == depth), [])

    def forward(self, items: Any, film: Film | None = None, groups: torch.Tensor | None = None) -> torch.Tensor:
        inputs = fitting_inputs(dict(items), self._accepted)
        if self.pooling == "last_token":
            inputs = mask_positions(inputs, self._accepted)
        with self._conditioned(film, groups):
            outputs = self.backbone(**inputs)
        pooled = pool_hidden(self.pooling, outputs, inputs, self.backbone)
        return self.apply_film(pooled, film, self.num_film_layers - 1, groups)

    @contextmanager
    def _conditioned(self, film: Film | None, groups: torch.Tensor | None) -> Iterator[None]:
        if film is None:
            yield
            return

        def hook(layer: int) -> Any:
            def changed(module: nn.Module, inputs: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                gammas, betas = (part[:, layer].to(hidden.dtype)[groups].unsqueeze(1) for part in film)
                hidden = torch.addcmul(betas, gammas, hidden)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return changed

        handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(self._layers())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
