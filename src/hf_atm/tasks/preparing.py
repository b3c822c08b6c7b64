"""From a loaded task's columns to model inputs: tokens, blocks of tokens, pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .loading import TaskData


def prepare_text(task: TaskData, tokenizer: Any, max_length: int | None = None) -> TaskData:
    """Tokenises one or two text columns, truncated to `spec.max_length`, else `max_length`; padding is the collator's.

    Args:
        task (`TaskData`): A text task.
        tokenizer (`PreTrainedTokenizerBase`): The backbone's tokenizer.
        max_length (`int`, *optional*, defaults to 128): Tokens kept where the specification sets no limit.

    Returns:
        `TaskData`: splits with the tokenizer's columns and `labels`.
    """
    _expect(task, "text")
    length = task.spec.max_length or max_length or 128

    def tokenise(batch: Mapping[str, list]) -> Mapping[str, list]:
        return tokenizer(*(batch[c] for c in ("text", "text_pair") if c in batch), truncation=True, max_length=length)

    return task.map(
        lambda split: split.map(
            tokenise,
            batched=True,
            remove_columns=[c for c in split.column_names if c != "labels"],
            desc=task.spec.name,
        )
    )


def prepare_causal_lm(task: TaskData, tokenizer: Any, block_size: int | None = None) -> TaskData:
    """Joins the texts, each closed by the end-of-sequence token, and cuts them into blocks of equal length.

    Args:
        task (`TaskData`): A task loaded with `causal_lm=True`.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        block_size (`int`, *optional*, defaults to 128): Tokens of a block where `spec.max_length` sets none.

    Returns:
        `TaskData`: splits with `input_ids`, `attention_mask` and `labels`, all `(block_size,)`; a last part shorter
        than a block is dropped.

    Raises:
        ValueError: If a split holds less than one block.
    """
    _expect(task, "causal_lm")
    size = task.spec.max_length or block_size or 128
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def blocks(split: Dataset) -> Dataset:
        tokens: list[int] = []
        for start in range(0, len(split), 1000):
            for ids in tokenizer(split[start : start + 1000]["text"], verbose=False)["input_ids"]:
                tokens += ids if ids[-1:] == end else ids + end
        count = len(tokens) // size
        if count == 0:
            raise ValueError(
                f"task {task.spec.name!r}: a split holds {len(tokens)} tokens, fewer than one block of {size}; "
                "lower max_length or add text"
            )
        ids = [tokens[i * size : (i + 1) * size] for i in range(count)]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * size] * count, "labels": ids})

    return task.map(blocks)


def make_image_processor(
    size: int, num_channels: int = 3, mean: float | list[float] = 0.5, std: float | list[float] = 0.5
) -> Any:
    """An image processor for a model that brings none: squares of `size` pixels, normalised by `mean` and `std`."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    mean = [mean] * num_channels if isinstance(mean, (int, float)) else list(mean)
    std = [std] * num_channels if isinstance(std, (int, float)) else list(std)
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=std)


def prepare_images(task: TaskData, processor: Any, num_channels: int = 3) -> TaskData:
    """Brings images to the model's channels and size, kept as bytes; each batch is normalised when it is read.

    Args:
        task (`TaskData`): An image task; grey images gain channels, colour images lose them, as `num_channels` says.
        processor (`BaseImageProcessor`): The backbone's, or one from [`make_image_processor`].
        num_channels (`int`, *optional*, defaults to 3): 3 for RGB, 1 for grey.

    Returns:
        `TaskData`: splits with `pixel_values`, `(num_channels, height, width)` fp32 when read and one byte per value
        at rest, and `labels`.

    Raises:
        ValueError: If the processor gives images of several sizes.
    """
    _expect(task, "image")
    mode = {1: "L", 3: "RGB"}[num_channels]

    def resize(batch: Mapping[str, list]) -> dict[str, list]:
        images = [np.asarray(image.convert(mode)).reshape(image.height, image.width, -1) for image in batch["image"]]
        # Without `return_tensors`, since images of several sizes are found out below.
        arrays = processor(images, do_rescale=False, do_normalize=False, input_data_format="channels_last")
        arrays = [np.asarray(array) for array in arrays["pixel_values"]]
        return {
            "pixel_values": [np.rint(a).clip(0, 255).astype(np.uint8).tobytes() for a in arrays],
            "shape": [list(a.shape) for a in arrays],
        }

    def prepare(split: Dataset) -> Dataset:
        split = split.map(resize, batched=True, batch_size=256, remove_columns="image", desc=task.spec.name)
        shapes = sorted({tuple(shape) for shape in split["shape"]})
        if len(shapes) > 1:
            raise ValueError(
                f"task {task.spec.name!r}: the image processor gives several sizes, such as {shapes[0]} and "
                f"{shapes[-1]}; give it one fixed height and width"
            )
        return split.remove_columns("shape").with_transform(_PixelReader.of(processor, shapes[0]))

    return task.map(prepare)


@dataclass(frozen=True, eq=False)
class _PixelReader:
    """Turns stored bytes into normalised images; a class rather than a closure, so that loader workers can copy it."""

    shape: tuple[int, ...]
    scale: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, processor: Any, shape: tuple[int, ...]) -> _PixelReader:
        channels = np.ones((shape[0], 1, 1))
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = 0 * channels, channels
        if processor.do_normalize:
            mean, std = (np.reshape(v, (-1, 1, 1)) * channels for v in (processor.image_mean, processor.image_std))
        return cls(shape, (factor / std).astype(np.float32), (-mean / std).astype(np.float32))

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "pixel_values" in batch:
            import torch

            pixels = np.frombuffer(b"".join(batch["pixel_values"]), dtype=np.uint8).reshape(-1, *self.shape)
            batch["pixel_values"] = list(torch.from_numpy(pixels.astype(np.float32) * self.scale + self.offset))
        return batch


def _expect(task: TaskData, kind: str) -> None:
    if task.kind != kind:
        raise ValueError(f"task {task.spec.name!r} holds {task.kind} data, and this model needs {kind} data")
