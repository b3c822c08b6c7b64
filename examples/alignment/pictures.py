"""A folder of pictures as two pairs of tensors on one device."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor


@dataclass
class Pictures:
    """Images (N, channels, height, width) from -1 to 1 and classes (N,), all on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def batches(self, count: int, size: int = 250) -> list[Tensor]:
        """The first training images in batches, as REPAIR and matching by activations take them."""
        return list(self.train_images[:count].split(size))


def read_pictures(folder: Path, device: str | torch.device = "cpu", test: int | None = None) -> Pictures:
    """
    Reads `train.parquet` and `test.parquet`, columns `image` (encoded bytes) and `label`.

    Args:
        folder (`Path`): where the files are.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where the tensors go.
        test (`int`, *optional*): how many test pictures to keep; all by default.
    """
    parts: list[Tensor] = []
    for split, count in (("train", None), ("test", test)):
        file = folder / f"{split}.parquet"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; point --data at the folder that holds {folder.name}.")
        table = pq.read_table(file, columns=["image", "label"])
        encoded = table["image"].to_pylist()[:count]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in encoded])
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        parts += [
            torch.tensor(pixels, device=device).float() / 127.5 - 1,
            torch.tensor(table["label"].to_pylist()[:count], device=device),
        ]
    return Pictures(*parts)


def disturbed(padded: Tensor, rows: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """
    Some of the images, each shifted at random by up to `pad` pixels and flipped with a chance of one half.

    Args:
        padded (`Tensor`): all images, (N, channels, height + 2 pad, width + 2 pad).
        rows (`Tensor`): which of them.
        pad (`int`): pixels.
        flip (`bool`): whether left may become right.
        generator (`torch.Generator`): of the device of the images.
    """
    device, height, width = padded.device, padded.shape[2] - 2 * pad, padded.shape[3] - 2 * pad
    shifts = torch.randint(2 * pad + 1, (2, len(rows), 1), device=device, generator=generator)
    ys = torch.arange(height, device=device) + shifts[0]
    xs = torch.arange(width, device=device) + shifts[1]
    if flip:
        xs = torch.where(torch.rand(len(rows), 1, device=device, generator=generator) < 0.5, xs.flip(1), xs)
    return padded[rows[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
