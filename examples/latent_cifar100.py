"""Latent spaces of CNNs that share no weights, aggregated on CIFAR-100: the three settings of RLSA.

    python examples/latent_cifar100.py --data ../shared/data/vision/cifar100

Every task is a small CNN trained from its own random start on some of the classes:

1. shared samples: S classes with the same samples in every task, and ten more in each;
2. shared classes: two tasks over all classes, four fifths of one half and one fifth of the other;
3. neither: two tasks, half of the classes each.

Compared: one CNN trained on everything; the union of plain embeddings ("naive") and of relative ones (RLSA), where an oracle
names each test sample's task; and without the oracle, every sample through every CNN, plain embeddings averaged or put side
by side, or RLSA with `routing="average"`. The oracle tells a space which classes to expect, so only the last three and the
first can be used. About five minutes on one core (https://huggingface.co/papers/2311.06547).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_atm.latent import (
    EmbeddingSet,
    aggregate_latent_spaces,
    centroid_accuracy,
    extract_embeddings,
    linear_cka,
    linear_probe,
    select_anchors,
    separability,
)
from hf_atm.seeding import derive_seed


END_TO_END, END_TO_END_RELATIVE = "end to end", "end to end, relative"


@dataclass
class Samples:
    """Images (N, 3, H, W) and classes of all samples; which of them are for training. A sample's id is its row."""

    images: Tensor
    labels: Tensor
    train: Tensor

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def read_cifar(folder: str) -> Samples:
    import datasets

    files = {split: str(Path(folder) / f"{split}.parquet") for split in ("train", "validation", "test")}
    missing = [file for file in files.values() if not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} does not exist; point --data at a folder with three parquet files")
    data = datasets.load_dataset("parquet", data_files=files)
    pixels = [np.stack([np.asarray(image) for image in data[split]["image"]]) for split in files]
    labels = [torch.tensor(data[split]["label"]) for split in files]
    images = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    train = torch.cat([torch.full((len(part),), split == "train") for split, part in zip(files, labels, strict=True)])
    return Samples(images.contiguous(memory_format=torch.channels_last), torch.cat(labels), train)


def synthetic(classes: int = 20, per_class: int = 24, seed: int = 0) -> Samples:
    """Noisy 16 x 16 pictures, two thirds of them for training."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    patterns = torch.randn(classes, 3, 16, 16, generator=generator)
    images = patterns[labels] + 0.7 * torch.randn(len(labels), 3, 16, 16, generator=generator)
    return Samples(images, labels, torch.arange(len(labels)) % 3 != 2)


class CNN(nn.Module):
    """Three convolutions; the embedding is the mean of the last feature map."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        sizes = (3, width // 4, width // 2, width)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, *shape, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b, shape in zip(sizes[:-1], sizes[1:], ((4, 2), (3, 1), (3, 1)), strict=True)
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def train_cnn(samples: Samples, rows: Tensor, seed: int, options: argparse.Namespace) -> nn.Module:
    """A CNN from its own random start, trained on some samples; labels are those of all tasks."""
    torch.manual_seed(seed)
    model = CNN(samples.classes, options.width).to(memory_format=torch.channels_last)
    steps = options.epochs * (len(rows) // options.batch_size + 1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(options.epochs):
        for part in rows[torch.randperm(len(rows))].tensor_split(len(rows) // options.batch_size + 1):
            images = samples.images[part]
            images = torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, images.flip(3), images)
            loss = nn.functional.cross_entropy(model(images), samples.labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def embed(samples: Samples, model: nn.Module, task: str, own: Tensor) -> EmbeddingSet:
    """The space of a CNN on all samples, with marks of those of its task."""
    data = DataLoader(TensorDataset(samples.images, samples.labels), batch_size=500)
    space = extract_embeddings(model.body, data, task=task, progress=False)
    return EmbeddingSet(task, space.ids, space.embeddings, space.labels, own)


@dataclass
class Setting:
    """Training samples of each task, which of all samples it owns when an oracle speaks, and where anchors may come
    from."""

    name: str
    tasks: list[Tensor]
    owned: list[Tensor]
    candidates: Tensor


def settings(samples: Samples, shared: Sequence[int], novel: int, held_out: int, seed: int) -> list[Setting]:
    generator = torch.Generator().manual_seed(derive_seed("classes", seed))
    order = torch.randperm(samples.classes, generator=generator)
    rows = torch.arange(len(samples.labels))

    def of(classes: Tensor) -> Tensor:
        return torch.isin(samples.labels, classes)

    result = []
    for count in shared:
        groups = order[count:].split(novel)
        common = order[:count]
        owned = [of(torch.cat([common, group])) for group in groups]
        tasks = [rows[samples.train & mine] for mine in owned]
        result.append(Setting(f"1, S={count}", tasks, owned, rows[samples.train & of(common)]))

    # Anchors of the other settings are samples that no task trains on.
    aside = torch.zeros(len(rows), dtype=torch.bool)
    train = rows[samples.train]
    aside[train[torch.randperm(len(train), generator=generator)[:held_out]]] = True
    halves = [of(half) for half in order.tensor_split(2)]
    usable = samples.train & ~aside
    coin = torch.rand(len(rows), generator=generator) < 0.8
    mostly = [(halves[0] & coin) | (halves[1] & ~coin), (halves[1] & coin) | (halves[0] & ~coin)]
    for name, owned in (("2", mostly), ("3", halves)):
        result.append(Setting(name, [rows[usable & mine] for mine in owned], owned, rows[aside]))
    return result


def measure(samples: Samples, spaces: Mapping[str, tuple], probe: int) -> dict[str, dict]:
    """Accuracies after fitting on training rows, separability of test rows, CKA to the end-to-end space: relative
    spaces to its relative one, plain ones to the plain one."""
    result = {}
    for name, (ids, embeddings) in spaces.items():
        ids, embeddings = torch.as_tensor(ids), torch.as_tensor(embeddings)
        fit, score = (samples.train[ids] == part for part in (True, False))
        parts = (embeddings[fit], samples.labels[ids[fit]], embeddings[score], samples.labels[ids[score]])
        reference = spaces[END_TO_END_RELATIVE if "RLSA" in name or name == END_TO_END_RELATIVE else END_TO_END]
        joint = EmbeddingSet("joint", *reference).select(ids[score].unique()).embeddings
        single = len(joint) == len(parts[2])
        result[name] = {
            "probe": linear_probe(*parts, max_iter=probe),
            "centroid": centroid_accuracy(*parts),
            "separability": separability(parts[2], parts[3]),
            "CKA": linear_cka(parts[2][ids[score].argsort()], joint) if single else None,
        }
    return result


def compare(samples: Samples, setting: Setting, joint: EmbeddingSet, options: argparse.Namespace) -> dict[str, dict]:
    """Trains a setting's tasks, and measures every way to make one space of them."""
    sets = []
    for number, (rows, owned) in enumerate(zip(setting.tasks, setting.owned, strict=True)):
        model = train_cnn(samples, rows, derive_seed(options.seed, setting.name, number) % 2**32, options)
        sets.append(embed(samples, model, f"task{number}", owned))
    count = min(options.anchors, len(setting.candidates))
    anchors = select_anchors(sets, count, seed=options.seed, candidates=setting.candidates)

    def rest(space: EmbeddingSet) -> EmbeddingSet:
        # Neither anchors nor samples that were held out for them are measured.
        return space.drop(anchors).drop([] if setting.name.startswith("1") else setting.candidates)

    marked = [rest(entry) for entry in sets]
    of_own_task = [entry.select(entry.ids[entry.own.numpy()]) for entry in marked]
    ids = marked[0].ids
    rlsa = {
        routing: rest(aggregate_latent_spaces(sets, anchors, routing=routing)) for routing in ("oracle", "average")
    }
    relative = rest(aggregate_latent_spaces([joint], anchors))
    spaces = {
        END_TO_END: (ids, joint.select(ids).embeddings),
        END_TO_END_RELATIVE: (relative.ids, relative.embeddings),
        # A sample of several tasks has a row in each of their frames, as in the paper; the split is by sample.
        "naive, oracle": (
            np.concatenate([entry.ids for entry in of_own_task]),
            torch.cat([entry.embeddings for entry in of_own_task]),
        ),
        "RLSA, oracle": (rlsa["oracle"].ids, rlsa["oracle"].embeddings),
        "mean of embeddings": (ids, sum(entry.embeddings for entry in marked) / len(marked)),
        "side by side": (ids, torch.cat([entry.embeddings for entry in marked], dim=1)),
        "RLSA, average": (rlsa["average"].ids, rlsa["average"].embeddings),
    }
    return measure(samples, spaces, options.probe_iterations)


def table(results: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    lines = ["| setting | space | probe | centroid | separability | CKA to end to end |", "|---|---|---|---|---|---|"]
    for setting, spaces in results.items():
        for name, values in spaces.items():
            cells = " | ".join("-" if value is None else f"{value:.3f}" for value in values.values())
            lines.append(f"| {setting} | {name} | {cells} |")
    return "\n".join(lines)


def main(read: Callable[[str], Samples] = read_cifar) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/vision/cifar100", help="folder of parquet files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of the embeddings")
    parser.add_argument("--anchors", type=int, default=256)
    parser.add_argument("--shared", type=int, nargs="+", default=[80, 60, 40], help="S of setting 1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--probe-iterations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small synthetic pictures, a few seconds")
    options = parser.parse_args()
    novel, held_out = 10, 1000
    if options.quick:
        options.epochs, options.width, options.anchors, options.shared = 2, 16, 40, [12, 8]
        novel, held_out = 4, 60
    samples = synthetic(seed=options.seed) if options.quick else read(options.data)
    started = time.perf_counter()
    rows = torch.arange(len(samples.labels))
    everything = train_cnn(samples, rows[samples.train], derive_seed(options.seed, "joint") % 2**32, options)
    joint = embed(samples, everything, "joint", torch.ones(len(rows), dtype=torch.bool))
    print(f"end to end: {time.perf_counter() - started:.0f} s", flush=True)
    results = {}
    for setting in settings(samples, options.shared, novel, held_out, options.seed):
        results[setting.name] = compare(samples, setting, joint, options)
        print(f"setting {setting.name}: {len(setting.tasks)} tasks, {time.perf_counter() - started:.0f} s", flush=True)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
