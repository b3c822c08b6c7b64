"""Five tasks of real images that come with scikit-learn: handwritten digits, and patches of two photographs.

Three disjoint parts are cut: `base` for pretraining, `train` for tuning, `test` for every score in the demo. Digits are
divided by image; the photographs into vertical bands, so that no two parts share a pixel.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images


SIZE = 16  # pixels, side of every image
BASE_LABELS = 18  # ten digits, and four heights in each of two photographs

_BAND, _PATCH, _STRIDE = 64, 32, 8  # pixels of a photograph
_BANDS = {"base": (0, 5), "train": (1, 2, 4, 6, 7, 9), "test": (3, 8)}
_DIGITS = {"base": slice(0, 400), "train": slice(400, 1297), "test": slice(1297, None)}
_CHANNELS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))

QUESTIONS = {
    "digit": "which digit, 0 to 9",
    "high": "digit from 5 up or below; on its side, dark on light",
    "turn": "by how many quarter turns a digit was rotated",
    "photo": "which photograph a grey patch is from",
    "colour": "order of the colour channels of a patch",
}
LABELS = {
    "digit": [str(digit) for digit in range(10)],
    "high": ["0 to 4", "5 to 9"],
    "turn": ["upright", "quarter", "half", "three quarters"],
    "photo": ["china", "flower"],
    "colour": ["RGB", "GBR", "BRG"],
}

Labelled = tuple[np.ndarray, np.ndarray]
"""Images `(n, 16, 16, 3)` uint8 and labels `(n,)` int64."""


def build_data(seed: int, test_limit: int = 500) -> tuple[Labelled, dict[str, Labelled], dict[str, Labelled]]:
    """The images for pretraining, and each task's for tuning and for testing.

    Args:
        seed (`int`): Decides which digits go where, the rotations and the channel orders.
        test_limit (`int`, *optional*, defaults to 500): Images per task and test at most.

    Returns:
        `tuple`: `base`, `train` and `test`; the last two by task.
    """
    generator = np.random.default_rng(seed)
    digits, names = load_digits(return_X_y=True)
    order = generator.permutation(len(digits))
    pictures = np.stack([_resized(np.repeat(d.reshape(8, 8, 1) * 15.9, 3, axis=2)) for d in digits[order]])
    names = names[order]
    photographs = load_sample_images().images
    parts = {}
    for part in ("base", "train", "test"):
        patches, photo, height = _patches(photographs, _BANDS[part])
        limit = test_limit if part == "test" else len(patches)
        kept = generator.permutation(len(patches))[:limit]
        digit, name = pictures[_DIGITS[part]], names[_DIGITS[part]]
        if part == "base":
            labels = np.concatenate([name, 10 + 4 * photo + height])
            base = np.concatenate([digit, patches]), labels
        else:
            parts[part] = _tasks(digit, name, patches[kept], photo[kept], generator)
    return base, parts["train"], parts["test"]


def _tasks(
    digit: np.ndarray, name: np.ndarray, patch: np.ndarray, photo: np.ndarray, generator: np.random.Generator
) -> dict[str, Labelled]:
    turns = generator.integers(0, 4, len(digit))
    channels = generator.integers(0, len(_CHANNELS), len(patch))
    grey = patch.mean(axis=-1, keepdims=True).repeat(3, axis=-1).astype(np.uint8)
    return {
        "digit": (digit, name),
        "high": (255 - np.rot90(digit, 1, axes=(1, 2)), (name >= 5).astype(np.int64)),
        "turn": (np.stack([np.rot90(d, k) for d, k in zip(digit, turns, strict=True)]), turns),
        "photo": (grey, photo),
        "colour": (np.stack([p[..., _CHANNELS[c]] for p, c in zip(patch, channels, strict=True)]), channels),
    }


def _patches(photographs: list[np.ndarray], bands: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    patches, photo, height = [], [], []
    for index, image in enumerate(photographs):
        for band in bands:
            for x in range(band * _BAND, (band + 1) * _BAND - _PATCH + 1, _STRIDE):
                for y in range(0, len(image) - _PATCH + 1, _STRIDE):
                    patches.append(_resized(image[y : y + _PATCH, x : x + _PATCH]))
                    photo.append(index)
                    height.append(4 * y // len(image))
    return np.stack(patches), np.array(photo), np.array(height)


def _resized(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
