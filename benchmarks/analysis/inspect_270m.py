"""`hf-atm inspect` on two checkpoints of 270 million parameters: seconds and peak memory, as a process of its own.

    python benchmarks/analysis/inspect_270m.py

The architecture is Gemma 3's smallest (vocabulary 262,144, width 640, 18 layers), weights random, in bfloat16; the two models
differ from their base by dense noise, which is the hardest case: every matrix has full rank.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig


def write_models(folder: Path) -> int:
    """A base and two models; their number of parameters."""
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for index in (1, 2):
        (folder / f"model{index}").mkdir()
        moved = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in state.items()}
        save_file(moved, folder / f"model{index}" / "model.safetensors")
    return sum(tensor.numel() for tensor in state.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=("cheap", "full"), default="full")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_models(folder)
        models = [str(folder / name) for name in ("base", "model1", "model2")]
        started = time.perf_counter()
        command = [sys.executable, "-m", "hf_atm.cli", "inspect", *models, "--level", options.level, "--quiet"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(
        f"\n{parameters / 1e6:.0f} M parameters: {seconds:.1f} s, peak memory {peak:.2f} GiB (includes mapped pages)"
    )
