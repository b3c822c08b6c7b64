"""Trains one network from several seeds, each of them a start of its own.

    python examples/alignment/train.py resnet20-ln-x3 --seeds 0 1 2 3 4

Names of networks are those of `networks.py`. Checkpoints go to `runs/alignment/DATASET/NETWORK/seed-N.safetensors`, in half
precision; what exists is not trained again. All pictures lie on the device; an accelerator is used when there is one.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from networks import build
from pictures import Pictures, disturbed, read_pictures
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad


DATASETS = {"mlp": "fashion_mnist", "resnet": "eurosat32", "vit": "mnist"}
# What is written on the left may not be mirrored.
UPRIGHT = ("mnist", "gtsrb")


def kind_of(network: str) -> str:
    return next((kind for kind in DATASETS if network.startswith(kind)), "mlp")


def make_optimizer(network: str, model: nn.Module, rate: float | None, decay: float | None) -> torch.optim.Optimizer:
    """SGD for ResNets, AdamW for others, with the rate and weight decay that suit them unless told others."""
    usual = (1e-3, 0.05)
    if kind_of(network) == "resnet":
        # With LayerNorm a ResNet learns better at a lower rate than suits BatchNorm.
        usual = (0.1, 5e-4) if "-bn-" in network else (0.03, 1e-3)
    given = {"lr": usual[0] if rate is None else rate, "weight_decay": usual[1] if decay is None else decay}
    if kind_of(network) == "resnet":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **given)
    return torch.optim.AdamW(model.parameters(), **given)


def train(network: str, seed: int, data: Pictures, options: argparse.Namespace) -> nn.Module:
    """A network from its own random weights and order of data."""
    device = data.train_images.device
    torch.manual_seed(seed)
    model = build(network, data.shape, data.classes).to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = make_optimizer(network, model, options.learning_rate, options.weight_decay)
    count = len(data.train_labels)
    per_epoch = -(-count // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], options.epochs * per_epoch, pct_start=0.15, cycle_momentum=False
    )
    shift = 4 if kind_of(network) == "resnet" else 1
    padded = pad(data.train_images, (shift,) * 4, mode="reflect").contiguous(memory_format=torch.channels_last)
    flip = options.dataset not in UPRIGHT
    model.train()
    for _ in range(options.epochs):
        for rows in torch.randperm(count, device=device, generator=generator).tensor_split(per_epoch):
            images = disturbed(padded, rows, shift, flip, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss = cross_entropy(model(images).float(), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    model.eval()
    logits = torch.cat([model(part).float() for part in images.split(batch_size)])
    right = (logits.argmax(1) == labels).float().mean()
    return float(right), float(cross_entropy(logits, labels))


def save(model: nn.Module, file: Path, facts: dict[str, object]) -> None:
    """Writes tensors in half precision, beside the file first."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.tmp")
    save_file(tensors, beside, metadata={"format": "pt", **{name: str(fact) for name, fact in facts.items()}})
    os.replace(beside, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/vision"), help="folder of data sets")
    parser.add_argument("--dataset", help="by default fashion_mnist, eurosat32 or mnist, by the kind of network")
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--learning-rate", type=float, help="default: what suits the kind of network")
    parser.add_argument("--weight-decay", type=float, help="likewise")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.dataset = options.dataset or DATASETS[kind_of(options.network)]
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    data = read_pictures(options.data / options.dataset, options.device)
    for seed in options.seeds:
        file = options.output / options.dataset / options.network / f"seed-{seed}.safetensors"
        if file.is_file():
            print(f"{file} exists", flush=True)
            continue
        started = time.perf_counter()
        model = train(options.network, seed, data, options)
        accuracy, loss = score(model, data.test_images, data.test_labels)
        facts = {"network": options.network, "dataset": options.dataset, "seed": seed, "epochs": options.epochs}
        save(model, file, {**facts, "accuracy": accuracy})
        seconds = time.perf_counter() - started
        print(f"{file}: test accuracy {accuracy:.3f}, loss {loss:.3f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
