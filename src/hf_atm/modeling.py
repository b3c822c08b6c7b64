"""`MultiTaskModel`: one shared backbone, one head per task, both those of plain transformers classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from . import backbones
from .multi_task_config import MultiTaskConfig, check_labels, classification_loss, normalize_task
from .prototypical import PooledPrototypicalHead, default_pooling
from .seeding import derive_seed
from .task_modules import PooledHead, StockHead, ZeroShotHead, known_width
from .task_specific import TaskSpecificMixin


class MultiTaskModel(TaskSpecificMixin):
    """One shared backbone and, per task, the head that plain transformers would put on it.

    `heads[task]` holds everything the stock classification class of the backbone's family has beside the backbone,
    and runs that class's own code, so [`~MultiTaskModel.to_task_model`] gives a stock model with equal logits.

    Args:
        config ([`MultiTaskConfig`]): The configuration.
        backbone ([`PreTrainedModel`], *optional*): A backbone to use as it is; else one is built at random.
        seed (`int`, *optional*): Decides new heads, each by its task's name alone; by default torch's current seed.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> from hf_atm import MultiTaskConfig, MultiTaskModel

    >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = MultiTaskModel(MultiTaskConfig(backbone_config=tiny, tasks={"sst2": {"num_labels": 2}}))
    >>> model(input_ids=model.dummy_inputs["input_ids"], task="sst2").logits.shape
    torch.Size([3, 2])
    >>> type(model.to_task_model("sst2")).__name__
    'BertForSequenceClassification'

    ```
    """

    config_class = MultiTaskConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # The loss is the mean over the batch whatever `num_items_in_batch` says, so the Trainer must do the scaling.
    accepts_loss_kwargs = False
    # The backbone decides on its own attention; these only let its choice through.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, config: MultiTaskConfig, backbone: PreTrainedModel | None = None, seed: int | None = None
    ) -> None:
        if config.backbone_config is None and backbone is None:
            raise ValueError("this MultiTaskConfig has no backbone_config; set it or use MultiTaskModel.from_backbone")
        super().__init__(config)
        if backbone is None:
            backbone = backbones.build_backbone(config.backbone_config, config.backbone_class)
        seed = torch.initial_seed() if seed is None else seed
        if config.backbone_class is None:
            backbone = backbones.match_structure(backbone, config.pooling, seed)
        config.backbone_config = backbone.config  # one object: what changes one (a resized vocabulary) is saved
        self.backbone = backbone
        self.main_input_name = backbone.main_input_name
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        self.heads = nn.ModuleDict(
            {name: self._new_head(name, spec, seed) for name, spec in self.config.tasks.items()}
        )
        self._init_task_specific()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for head in model.heads.values():  # transformers makes every weight it loads trainable
            if isinstance(head, ZeroShotHead):
                head.requires_grad_(False)
        return loaded

    def init_weights(self) -> None:
        # Backbone and heads have drawn their own weights, or carry pretrained ones that must stay.
        self.tie_weights(recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        # Reached for weights that a checkpoint lacks, such as the head of a task added to its configuration.
        if isinstance(module, (ZeroShotHead, PooledPrototypicalHead)):
            module.reset_parameters()
        else:
            self.backbone._init_weights(module)

    def _new_head(self, name: str, spec: dict[str, Any], seed: int) -> nn.Module:
        pattern = self.backbone
        head: nn.Module
        if spec.get("head") == "zero_shot":
            with torch.device("meta"):
                head = ZeroShotHead(spec["num_labels"], self.backbone.config.projection_dim)
            pattern = self
        elif spec.get("head") == "prototypical":
            pooling = spec.get("pooling") or self.config.pooling or default_pooling(self.backbone)
            with torch.device("meta"):
                head = PooledPrototypicalHead(
                    pooling, known_width(self.backbone.config, self.config.feature_size), spec
                )
            pattern = self
        elif self.config.pooling is not None:
            with torch.device("meta"):
                head = PooledHead(
                    self.backbone.config, self.config.pooling, spec["num_labels"], self.config.feature_size
                )
        else:
            pattern, child, path = backbones.meta_stock(self.backbone, spec)
            head = StockHead(pattern, child, path)
        like = next(self.backbone.parameters())
        return backbones.initialize(head, pattern, derive_seed("head", seed, name), like)

    @classmethod
    def from_backbone(
        cls,
        model: str | os.PathLike | nn.Module,
        tasks: dict[str, dict[str, Any]],
        config: PreTrainedConfig | None = None,
        pooling: str | None = None,
        dtype: torch.dtype | str | None = torch.float32,
        seed: int | None = None,
        **from_pretrained_kwargs: Any,
    ) -> MultiTaskModel:
        """Puts one new head per task on a pretrained backbone.

        Args:
            model (`str`, `os.PathLike` or [`PreTrainedModel`]): A Hub id, a folder, a backbone, or a model with a
                head, whose backbone is taken. A loaded model becomes part of the new one, without a copy. Of a
                two-tower model such as CLIP the image tower is taken.
            tasks (`dict[str, dict]`): Specification by task name, `{"sst2": {"num_labels": 2}}`.
            config ([`PreTrainedConfig`], *optional*): The backbone's configuration in place of its own.
            pooling (`str`, *optional*): See [`MultiTaskConfig`].
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): `None` keeps that of the weights; updates
                of bfloat16 weights are mostly lost in rounding, use mixed precision for speed.
            seed (`int`, *optional*): Decides each new head together with its task's name, not with their order, and
                weights the checkpoint lacks. By default torch's current seed; the global generators are not moved.
            from_pretrained_kwargs (`Any`): For `from_pretrained`.

        Raises:
            ValueError: If a specification is unusable, or the family has no stock class and `pooling` is `None`.
        """
        settings: Any = MultiTaskConfig(tasks=tasks, pooling=pooling)  # checked before anything is loaded
        if any(spec.get("head") == "zero_shot" for spec in settings.tasks.values()):
            raise ValueError("zero-shot heads need the text tower; use MultiTaskModel.from_clip")
        seed = torch.initial_seed() if seed is None else seed
        backbone = backbones.load_backbone(model, config, dtype, seed, from_pretrained_kwargs)
        return cls._wrap(settings, backbone, seed)

    @classmethod
    def _wrap(cls, settings: MultiTaskConfig, backbone: PreTrainedModel, seed: int) -> MultiTaskModel:
        settings.dtype = backbone.dtype
        settings.base_model_name_or_path = backbone.name_or_path or None
        return cls(settings, backbone=backbone, seed=seed).eval()

    @classmethod
    def from_clip(
        cls,
        clip: str | os.PathLike | PreTrainedModel,
        tasks: dict[str, dict[str, Any]],
        processor: Callable | None = None,
        tokenizer: Callable | None = None,
        dtype: torch.dtype | str | None = torch.float32,
        seed: int | None = None,
        **from_pretrained_kwargs: Any,
    ) -> MultiTaskModel:
        """CLIP's image tower with one frozen head of text features per task; logits are CLIP's own.

        The backbone is the image tower with its projection, both trained and merged; text features and scale are
        frozen. The text tower is not kept. Further trained heads may be added with [`~MultiTaskModel.add_task`].

        Args:
            clip (`str`, `os.PathLike` or [`PreTrainedModel`]): A CLIP or MetaCLIP 2 model, not copied if loaded.
            tasks (`dict[str, dict]`): `{"pets": {"labels": ["cat", "dog"], "templates": ["a photo of a {}."]}}`.
            processor (`Callable`, *optional*): Or `tokenizer`; needed with a model that is already loaded.
            tokenizer (`Callable`, *optional*): See `processor`.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): See [`~MultiTaskModel.from_backbone`].
            seed (`int`, *optional*): Unused by zero-shot heads; decides heads added later by default.
            from_pretrained_kwargs (`Any`): For `from_pretrained`.
        """
        backbones.check_zero_shot_specs(tasks)
        tasks = {
            name: {**spec, "head": "zero_shot", "templates": list(spec.get("templates", backbones.DEFAULT_TEMPLATES))}
            for name, spec in tasks.items()
        }
        settings: Any = MultiTaskConfig(tasks=tasks)
        encode = backbones.load_tokenizer(clip, tokenizer or processor, from_pretrained_kwargs)
        loaded = backbones.load_clip(clip, dtype, from_pretrained_kwargs)
        backbone, settings.backbone_class = backbones.vision_backbone(loaded)
        backbone.name_or_path = loaded.name_or_path
        model = cls._wrap(settings, backbone, torch.initial_seed() if seed is None else seed)
        for name, spec in settings.tasks.items():
            features = backbones.text_features(loaded, encode, list(spec["id2label"].values()), spec["templates"])
            head: Any = model.heads[name]
            head.text_features.copy_(features)
            head.logit_scale.copy_(loaded.logit_scale.detach())
        return model

    def add_task(self, name: str, spec: dict[str, Any], seed: int | None = None) -> None:
        """Adds a task with a new head; its private modules start from the values now live.

        Args:
            name (`str`): The new task's name.
            spec (`dict`): Its specification, as in [`~MultiTaskModel.from_backbone`].
            seed (`int`, *optional*): Decides the head together with the name; by default torch's current seed.
        """
        spec = normalize_task(name, spec)
        if name in self.heads:
            raise ValueError(f"task {name!r} exists already; the model knows {', '.join(self.heads)}")
        if spec.get("head") == "zero_shot":
            raise ValueError("zero-shot heads need the text tower; name all of them in MultiTaskModel.from_clip")
        head = self._new_head(name, spec, torch.initial_seed() if seed is None else seed)
        self.heads[name] = head.train(self.training)
        self.config.tasks = {**self.config.tasks, name: spec}
        self.config.task_order = list(self.config.tasks)
        if self.config.task_specific_modules:
            self._add_copies([name])

    @torch.no_grad()
    def reset_head(self, task: str, seed: int) -> None:
        """Gives a task's head new random values, in place.

        Args:
            task (`str`): The task.
            seed (`int`): Decides the values together with the task's name.
        """
        _, spec = self._spec(task)
        fresh = self._new_head(task, spec, seed).state_dict()
        for name, tensor in self.heads[task].state_dict().items():
            tensor.copy_(fresh[name])

    @torch.no_grad()
    def load_head(self, task: str, model: str | os.PathLike | PreTrainedModel) -> None:
        """Takes a task's head from a stock model of that task; its backbone is left alone.

        Args:
            task (`str`): The task.
            model (`str`, `os.PathLike` or [`PreTrainedModel`]): What [`~MultiTaskModel.to_task_model`] gives, or any
                model of the same class: a folder, a Hub id, or loaded.

        Raises:
            ValueError: If it is a model of another class, or has another number of labels.
        """
        task, _ = self._spec(task)
        head = self.heads[task]
        if not isinstance(head, StockHead):
            raise ValueError(f"task {task!r} has no stock head, so no stock model's head fits it")
        if isinstance(model, (str, os.PathLike)):
            model = head.stock_class.from_pretrained(model, dtype=self.dtype)
        wanted, given = head.state_dict(), model.state_dict()
        wrong = [
            f"{name} is {tuple(given[name].shape) if name in given else 'missing'}, not {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name not in given or given[name].shape != tensor.shape
        ]
        if wrong:
            raise ValueError(f"the head of {type(model).__name__} does not fit task {task!r}: {'; '.join(wrong)}")
        for name, tensor in wanted.items():
            tensor.copy_(given[name])

    def _spec(self, task: str | None) -> tuple[str, dict[str, Any]]:
        if task is None and len(self.heads) == 1:
            task = next(iter(self.heads))
        known = ", ".join(self.heads) or "none"
        if task is None:
            raise ValueError(f"the model has several tasks; pass task=, one of: {known}")
        if task not in self.heads:
            raise KeyError(f"unknown task {task!r}; the model knows: {known}")
        return task, self.config.tasks[task]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        episodes: torch.Tensor | None = None,
        task: str | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """One batch of one task.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Token indices.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 for real tokens.
                Decoder-only models take each last real token, whichever side the padding is on.
            token_type_ids, position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Dropped where the family has no such input.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`.
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`, *optional*): Images.
            labels (`torch.Tensor`, *optional*): Class indices `(batch_size,)`, numbers `(batch_size,)` or
                `(batch_size, num_labels)`. Their range is not checked here; see [`~MultiTaskModel.check_labels`].
            episodes (`torch.Tensor` of shape `(episodes, n_way, k_shot + n_query)`, *optional*): For a prototypical head,
                which of the batch's samples is where in each episode; see [`PrototypicalTaskHead`].
            task (`str`, *optional*): The task; may be left out if there is only one.
            return_dict (`bool`, *optional*): `False` for a plain tuple.
            kwargs (`Any`): Further inputs of the backbone.

        Returns:
            `SequenceClassifierOutput`: `logits` of shape `(batch_size, num_labels)`, the mean `loss` over the batch
            if `labels` were given, and what the backbone was asked for. Of `episodes`, logits and loss of their queries.
        """
        task, spec = self._spec(task)
        self.activate_task(task)
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
        }
        kwargs.pop("num_items_in_batch", None)
        if spec.get("head") == "prototypical":
            named["episodes"] = episodes
        elif episodes is not None:
            raise ValueError(f"task {task!r} has a classifier, which learns from labels, not from episodes")
        inputs = {**{key: value for key, value in named.items() if value is not None}, **kwargs}
        outputs = self.heads[task](self.backbone, **inputs)
        loss = outputs.get("loss")
        if labels is not None:
            loss = classification_loss(outputs.logits, labels, spec["problem_type"])
        result = SequenceClassifierOutput(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return result.to_tuple() if return_dict is False else result

    def to_task_model(self, task: str, pad_token_id: int | None = None) -> PreTrainedModel:
        """A stock model of one task, with equal logits; saves and loads without hf_atm.

        Weights are copied, private modules with this task's values; labels and problem type go into its
        configuration. Two differences remain for decoder-only models, where the stock class reads padding off the
        tokens instead of the mask: a real last token that equals the padding token is skipped, and left padding
        shifts absolute positions (GPT-2) unless `position_ids` are passed.

        Args:
            task (`str`): The task.
            pad_token_id (`int`, *optional*): Set in the export; decoder-only models without one in their
                configuration otherwise take only one sequence at a time.

        Raises:
            KeyError: If the task is unknown.
            ValueError: If the head has no stock counterpart (explicit pooling, zero-shot, prototypical) or adapters are attached.
        """
        task, spec = self._spec(task)
        if spec.get("head") == "prototypical":
            raise ValueError(
                f"task {task!r} has a prototypical head, which no stock class has; save the whole MultiTaskModel"
            )
        if self.config.pooling is not None:
            raise ValueError(
                f"task {task!r} uses pooling={self.config.pooling!r}, which no stock class computes; build the model "
                "with pooling=None to mirror one, or save the whole MultiTaskModel"
            )
        if spec.get("head") == "zero_shot":
            raise ValueError(
                f"task {task!r} has a zero-shot head: stock image classifiers neither project nor normalise features, "
                "so none has its logits; use to_clip_model(clip) for a stock CLIP model that does"
            )
        head = self.heads[task]
        if not isinstance(head, StockHead):
            raise ValueError(
                f"task {task!r} is wrapped by an adapter; call merge_and_unload() on the PEFT model first"
            )
        return backbones.to_stock(self.backbone, self.backbone_state_dict(task), head, spec, pad_token_id)

    def to_clip_model(self, clip: str | os.PathLike | PreTrainedModel, task: str | None = None) -> PreTrainedModel:
        """The CLIP model this one was built from, with the present image tower: equal logits for the same prompts.

        Args:
            clip (`str`, `os.PathLike` or [`PreTrainedModel`]): The original; a loaded one is changed in place.
            task (`str`, *optional*): Whose private modules to take; only matters if there are any.
        """
        if self.config.backbone_class is None:
            raise ValueError("to_clip_model is for models made by from_clip; use to_task_model")
        return backbones.to_clip(self.backbone, self.backbone_state_dict(task), clip)

    def check_labels(self, task: str, labels: Any) -> None:
        """Raises a `ValueError` that names the first label that `task`'s head and loss cannot take.

        Args:
            task (`str`): The task.
            labels (`Sequence`, `np.ndarray` or `torch.Tensor`): A whole column of labels.
        """
        task, spec = self._spec(task)
        check_labels(task, labels, spec["num_labels"], spec["problem_type"])

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        # The backbone's own configuration has the vocabulary size.
        return self.backbone.resize_token_embeddings(*args, **kwargs)


AutoConfig.register(MultiTaskConfig.model_type, MultiTaskConfig, exist_ok=True)
AutoModel.register(MultiTaskConfig, MultiTaskModel, exist_ok=True)
