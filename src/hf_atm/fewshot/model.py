"""`FewShotModel`: an encoder and a head that needs no training for new classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from .. import backbones
from .conditioning import TaskConditioning
from .encoders import EpisodeEncoder, PooledEncoder
from .gin import GINEncoder
from .heads import HEADS, MatchingHead, PrototypicalHead, class_means
from .support import SupportMixin


class FewShotModelConfig(PreTrainedConfig):
    """Configuration of a [`FewShotModel`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Of a transformers backbone.
        encoder (`dict`, *optional*): Settings of the [`PooledEncoder`], or of a [`GINEncoder`] without a backbone.
        head (`str`, *optional*, defaults to `"prototypical"`): Or `"matching"`.
        scale (`float` or `"auto"`, *optional*): See [`PrototypicalHead`]; 7.5, and 10 for matching, by default.
        distance (`str`, *optional*, defaults to `"sqeuclidean"`): Of the prototypical head; or `"cosine"`.
        conditioning (`bool`, *optional*, defaults to `False`): Whether the support set conditions the encoder.
        gamma_init, beta_init (`float`, *optional*, defaults to 0.0 and 1.0): See [`TaskConditioning`].
        support (`dict`, *optional*): Rows, labels and classes of the support set, kept by the model itself.
    """

    model_type = "atm_few_shot"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)
    }

    backbone_config: PreTrainedConfig | dict | None = None
    encoder: dict | None = None
    head: str = "prototypical"
    scale: float | str | None = None
    distance: str = "sqeuclidean"
    conditioning: bool = False
    gamma_init: float = 0.0
    beta_init: float = 1.0
    support: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; known: {', '.join(HEADS)}.")
        if self.conditioning and self.head == "matching":
            raise ValueError("conditioning needs prototypes, which head='matching' has not; use head='prototypical'.")
        super().__post_init__(**kwargs)


@dataclass
class FewShotOutput(ModelOutput):
    """What a [`FewShotModel`] makes of a batch of `E` episodes.

    Attributes:
        loss: mean cross-entropy over all queries.
        logits: `(E, N * Q, N)`, class by class as the queries come.
        labels: `(N * Q,)`, the queries' classes, on the CPU.
        query: `(E, N * Q, d)`, embeddings.
        prototypes: `(E, N, d)`.
    """

    loss: Any = None
    logits: Any = None
    labels: Any = None
    query: Any = None
    prototypes: Any = None


class FewShotModel(SupportMixin):
    """Classifies queries by a support set of a few samples per class, https://huggingface.co/papers/2206.03695.

    Args:
        config ([`FewShotModelConfig`]): The configuration.
        encoder ([`EpisodeEncoder`], *optional*): An encoder to use as it is; else one is built at random.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_atm.fewshot import FewShotModel

    >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = FewShotModel.from_encoder(BertModel(tiny), pooling="mean", scale="auto")
    >>> items = {"input_ids": torch.arange(12).view(6, 2)}
    >>> model(items, index=torch.arange(6).view(1, 2, 3), k_shot=1).logits.shape  # 2 classes, 1 support, 2 queries
    torch.Size([1, 4, 2])

    ```
    """

    config_class = FewShotModelConfig
    config: Any
    main_input_name = "index"
    accepts_loss_kwargs = False
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: FewShotModelConfig, encoder: EpisodeEncoder | None = None) -> None:
        super().__init__(config)
        self.encoder = _build_encoder(config) if encoder is None else encoder
        if isinstance(self.encoder, PooledEncoder):
            # Not before: a configuration below another is made to follow it, attention included.
            config.backbone_config = self.encoder.backbone.config
        scale: Any = {} if config.scale is None else {"scale": config.scale}
        self.head: nn.Module
        if config.head == "matching":
            self.head = MatchingHead(**scale)
        else:
            self.head = PrototypicalHead(distance=config.distance, **scale)
        self.conditioning: TaskConditioning | None = None
        if config.conditioning:
            if not self.encoder.num_film_layers:
                raise ValueError(
                    f"{type(self.encoder).__name__} has no layers to scale and shift; set conditioning=False."
                )
            self.conditioning = TaskConditioning(
                self.encoder.num_film_layers, self.encoder.embedding_dim, config.gamma_init, config.beta_init
            )
        if config.support:
            self._init_support()
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: nn.Module, pooling: str = "mean", **settings: Any) -> FewShotModel:
        """Puts a head on an encoder.

        Args:
            encoder ([`EpisodeEncoder`] or [`PreTrainedModel`]): Becomes part of the model, without a copy.
            pooling (`str`, *optional*, defaults to `"mean"`): Of a transformers backbone; see [`PooledEncoder`].
            settings (`Any`): See [`FewShotModelConfig`].
        """
        if isinstance(encoder, PreTrainedModel):
            encoder = PooledEncoder(encoder, pooling)
        if not isinstance(encoder, EpisodeEncoder):
            raise ValueError(
                f"{type(encoder).__name__} is no encoder of episodes; derive it from hf_atm.fewshot.EpisodeEncoder, "
                "or pass a transformers backbone."
            )
        config: Any = FewShotModelConfig(encoder=encoder.settings, **settings)
        return cls(config, encoder)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.head, PrototypicalHead):
            model.head.refresh()
        return loaded

    def init_weights(self) -> None:
        # The parts have drawn their own weights, or carry pretrained ones that must stay.
        self.tie_weights(recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        backbone: Any = getattr(self.encoder, "backbone", None)
        if backbone is not None:
            backbone._init_weights(module)

    @property
    def fixed_embeddings(self) -> bool:
        """Whether an item has one embedding, whatever episode it is in."""
        return self.conditioning is None and not self.encoder.per_episode

    def forward(self, items: Any, index: torch.Tensor, k_shot: int, return_dict: bool | None = None) -> Any:
        """A batch of episodes, as [`EpisodeCollator`] makes it.

        Args:
            items: Distinct items, collated.
            index (`torch.Tensor` of shape `(E, N, K + Q)`): Which of them each place of an episode is; support first.
            k_shot (`int`): K.
            return_dict (`bool`, *optional*): `False` for a plain tuple.

        Returns:
            [`FewShotOutput`].
        """
        if self.fixed_embeddings:
            embeddings = self.encoder(items)[index]
        else:
            embeddings = self._by_episode(items, index, self._film(items, index[..., :k_shot]))
        output = self.classify(embeddings, k_shot)
        return output.to_tuple() if return_dict is False else output

    def _film(self, items: Any, support: torch.Tensor) -> Any:
        """Scales and shifts by episode, from an unconditioned pass over the support alone."""
        if self.conditioning is None:
            return None
        if self.encoder.per_episode:
            embeddings = self._by_episode(items, support, None)
        else:
            rows, places = support.unique(return_inverse=True)
            embeddings = self.encoder(self.encoder.select(items, rows))[places]
        return self.conditioning(embeddings.mean(2))

    def _by_episode(self, items: Any, index: torch.Tensor, film: Any) -> torch.Tensor:
        groups = torch.arange(len(index), device=index.device).repeat_interleave(index[0].numel())
        embeddings = self.encoder(self.encoder.select(items, index.flatten()), film, groups)
        return embeddings.view(*index.shape, -1)

    def classify(self, embeddings: torch.Tensor, k_shot: int) -> FewShotOutput:
        """Scores of queries from embeddings `(E, N, K + Q, d)`, support first."""
        count, n_way, taken, _ = embeddings.shape
        support, query = embeddings[:, :, :k_shot].flatten(1, 2), embeddings[:, :, k_shot:].flatten(1, 2)
        classes = torch.arange(n_way)
        labels, members = classes.repeat_interleave(taken - k_shot), classes.repeat_interleave(k_shot)
        prototypes = class_means(support, members.to(support.device), n_way)
        if isinstance(self.head, PrototypicalHead):
            logits = self.head.classify(query, prototypes)
        else:
            logits = self.head(query, support, members.to(support.device))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).repeat(count))
        return FewShotOutput(loss=loss, logits=logits, labels=labels, query=query, prototypes=prototypes)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        self.config.encoder = self.encoder.settings
        return super().save_pretrained(save_directory, *args, **kwargs)


def _build_encoder(config: Any) -> EpisodeEncoder:
    if config.backbone_config is not None:
        return PooledEncoder(backbones.build_backbone(config.backbone_config), **(config.encoder or {}))
    if config.encoder is None:
        raise ValueError(
            "this FewShotModelConfig does not describe its encoder; build that yourself, make the model with "
            "FewShotModel.from_encoder, and load its state dict."
        )
    return GINEncoder(**config.encoder)


AutoConfig.register(FewShotModelConfig.model_type, FewShotModelConfig, exist_ok=True)
AutoModel.register(FewShotModelConfig, FewShotModel, exist_ok=True)
