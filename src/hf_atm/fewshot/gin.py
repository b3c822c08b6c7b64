"""Graph isomorphism networks, on torch_geometric."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .encoders import EpisodeEncoder, Film
from .graphs import select_graphs
from .require import torch_geometric


POOLINGS = ("mean", "sum")
NORMS = ("graph", "episode")


class GINEncoder(EpisodeEncoder):
    """Embeds graphs: GIN layers, all of them pooled together, https://huggingface.co/papers/1810.00826.

    Takes what [`GraphDataset`] collates, or a torch_geometric `Batch` as a mapping. Needs the extra `graphs`.

    Args:
        in_features (`int`): Features per node.
        hidden_size (`int`, *optional*, defaults to 64): Width of the layers and of the embeddings.
        num_layers (`int`, *optional*, defaults to 2): GIN layers.
        pooling (`str`, *optional*, defaults to `"mean"`): Over the nodes of a graph; or `"sum"`.
        dropout (`float`, *optional*, defaults to 0.0): After each layer, in [0, 1).
        norm (`str`, *optional*, defaults to `"graph"`): `"graph"` normalises over the nodes of each graph, so that
            embeddings depend on nothing else. `"episode"` does so over all graphs of an episode that are embedded
            together, queries among them.

    Raises:
        ImportError: Without torch_geometric.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        pooling: str = "mean",
        dropout: float = 0.0,
        norm: str = "graph",
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1.")
        for name, choice, known in (("pooling", pooling, POOLINGS), ("norm", norm, NORMS)):
            if choice not in known:
                raise ValueError(f"{name} is {choice!r}; known: {', '.join(known)}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1.")
        geometric = torch_geometric()
        self.in_features = in_features
        self.embedding_dim, self.num_film_layers, self.per_episode = hidden_size, num_layers + 1, norm == "episode"
        self.settings = {
            "in_features": in_features,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "pooling": pooling,
            "dropout": dropout,
            "norm": norm,
        }
        # The sum over neighbours alone: the network behind it normalises by graph, and GINConv does not tell it which.
        self.aggregate = geometric.GINConv(nn.Identity())
        widths = [in_features] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(
            geometric.MLP([width, hidden_size, hidden_size], norm="graph_norm", plain_last=True)
            for width in widths[:-1]
        )
        self.dropout = nn.Dropout(dropout)
        self.jump = geometric.JumpingKnowledge("cat")
        self.post = nn.Sequential(
            nn.Linear(sum(widths), hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.pool: Any = geometric.global_mean_pool if pooling == "mean" else geometric.global_add_pool

    def forward(self, items: Any, film: Film | None = None, groups: torch.Tensor | None = None) -> torch.Tensor:
        x, edges, batch, size = items["x"], items["edge_index"], items["batch"], len(items["ptr"]) - 1
        if x.shape[1] != self.in_features:
            raise ValueError(
                f"the graphs have {x.shape[1]} features per node, and the encoder takes {self.in_features}."
            )
        owner = None if groups is None else groups[batch]
        within, count = batch, size
        if self.per_episode:
            within = torch.zeros_like(batch) if owner is None else owner
            count = 1 if film is None and groups is None else int(within.max()) + 1
        hidden, kept = x, [x]
        for layer, network in enumerate(self.layers):
            hidden = network(self.aggregate(hidden, edges), batch=within, batch_size=count)
            hidden = self.dropout(self.apply_film(hidden, film, layer, owner))
            kept.append(hidden)
        hidden = self.apply_film(self.post(self.jump(kept)), film, self.num_film_layers - 1, owner)
        return self.pool(hidden, batch, size)

    def select(self, items: Any, rows: torch.Tensor) -> Any:
        return select_graphs(items, rows)
