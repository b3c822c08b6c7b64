"""Random numbers that depend on names and integers alone, never on process, hash seed or what ran before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the text of `parts`, by SHA-256."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block without leaving a trace in the global generators, optionally from its own seed.

    Device generators are saved too when a device is in use, but only CPU ones are seeded: the blocks run here
    (loading, collating) draw on the CPU, and dropout inside an evaluation is off.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
