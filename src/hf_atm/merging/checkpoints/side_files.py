"""Everything a checkpoint holds beside its weights: configurations, tokenizers, processors, templates."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from .reader import PICKLE_SUFFIXES
from .recipe import DTYPES


# Weights in any format, what a training run leaves behind, and what describes the old model.
_LEFT = (
    *(f"*{suffix}" for suffix in PICKLE_SUFFIXES),
    "*.safetensors.index.json",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.tflite",
    "*.ot",
    "optimizer*",
    "scheduler*",
    "trainer_state.json",
    "atm_state.*",
    "atm_report.json",
    "events.out.*",
    "README.md",
    "merge_config.json",
)
_LEFT_FOLDERS = (
    "checkpoint-*",
    "_staging",
    "runs",
    "onnx",
    "openvino",
    "adapters",
    "tasks",
    "task_specific",
    "alignment",
    "figures",
)
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
    "*.spm",
    "*bpe*",
    "chat_template*",
)


def list_side_files(folder: Path, copy_code: bool = False) -> tuple[list[str], list[str]]:
    """
    The files that a merged model takes over from a folder.

    Args:
        folder (`Path`): a checkpoint; a single file has no side files.
        copy_code (`bool`, *optional*, defaults to `False`): whether Python files are among them; they run when a model
            is loaded with `trust_remote_code`.

    Returns:
        `tuple[list[str], list[str]]`: relative names to copy, and Python files that stay behind. Weights of the folder
        itself do not count; weights in subfolders (such as a sentence-transformers `2_Dense`) are copied.
    """
    if not folder.is_dir():
        return [], []
    copied, code = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        *parents, leaf = name.split("/")
        if not path.is_file() or any(part.startswith(".") for part in (*parents, leaf)):
            continue
        if any(_matches(part, _LEFT_FOLDERS) for part in parents) or _matches(leaf, _LEFT):
            continue
        if leaf.endswith(".safetensors") and not parents:
            continue
        if leaf.endswith(".py") and not copy_code:
            code.append(name)
            continue
        copied.append(name)
    return copied, code


def copy_side_files(folder: Path, output: Path, names: Sequence[str]) -> None:
    """Copies the named files, with their subfolders."""
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, output / name)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of a folder's tokenizer files, chat templates included."""
    return [name for name in list_side_files(folder)[0] if _matches(name.split("/")[-1], _TOKENIZER)]


def set_config_dtype(output: Path, tensors: Iterable[Tensor]) -> None:
    """Lets `config.json` name the floating type that most weights now have, wherever it named another one before."""
    path = output / "config.json"
    entries: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            entries[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    if not path.is_file() or not entries:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = entries.most_common(1)[0][0]
    changed = False
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in DTYPES and part[key] != dtype:
                part[key], changed = dtype, True
    if changed:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
