"""Task conditioning: the support set scales and shifts the encoder's layers (FiLM)."""

from __future__ import annotations

import torch
from torch import nn


class _Film(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        width = max(1, dim // 2)
        self.skip = nn.Linear(dim, out, bias=False)
        self.chain = nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
        )

    def forward(self, task: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.skip(task) + self.chain(task))


class TaskConditioning(nn.Module):
    """Scales and shifts of an encoder's layers from an episode's prototypes.

    `gamma_l = 1 + gamma0_l * g(t)_l` and `beta_l = beta0_l * b(t)_l` with `t` the mean prototype, as in
    https://huggingface.co/papers/2206.03695 after TADAM, https://huggingface.co/papers/1805.10123.

    Args:
        num_layers (`int`): Places in the encoder that are scaled and shifted.
        dim (`int`): Width of the embeddings and of each place.
        gamma_init (`float`, *optional*, defaults to 0.0): First value of every `gamma0_l`.
        beta_init (`float`, *optional*, defaults to 1.0): First value of every `beta0_l`.
    """

    def __init__(self, num_layers: int, dim: int, gamma_init: float = 0.0, beta_init: float = 1.0) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}; conditioning needs at least 1.")
        self.num_layers, self.dim = num_layers, dim
        self.gamma, self.beta = _Film(dim, num_layers * dim), _Film(dim, num_layers * dim)
        self.gamma_scale = nn.Parameter(torch.full((num_layers,), float(gamma_init)))
        self.beta_scale = nn.Parameter(torch.full((num_layers,), float(beta_init)))

    def forward(self, prototypes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and shifts.

        Args:
            prototypes (`torch.Tensor` of shape `(..., N, dim)`): Of the unconditioned pass.

        Returns:
            Gammas and betas, each of shape `(..., num_layers, dim)`.
        """
        task = prototypes.mean(-2)
        shape = (*task.shape[:-1], self.num_layers, self.dim)
        gammas = 1 + self.gamma_scale.unsqueeze(-1) * self.gamma(task).view(shape)
        return gammas, self.beta_scale.unsqueeze(-1) * self.beta(task).view(shape)

    def penalty(self) -> torch.Tensor:
        """`|gamma0| + |beta0|`, which keeps conditioning where it pays."""
        return torch.linalg.vector_norm(self.gamma_scale) + torch.linalg.vector_norm(self.beta_scale)
