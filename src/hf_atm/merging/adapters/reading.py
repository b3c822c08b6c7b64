"""Where adapters come from: PEFT folders, Hub ids, pairs of configuration and tensors, live models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..tensors import check_names, content_names, listed
from .modules import LoraModule
from .parsing import check_config, parse_state, read_config


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter, read and checked.

    Args:
        name (`str`): the task's name.
        label (`str`): what messages call it: path, id or name.
        config (`LoraConfig`): its configuration.
        modules (`dict[str, LoraModule]`): adapted modules by name in the base model.
        saved (`dict[str, Tensor]`): other saved tensors by name in the base model.
        digest (`str`, *optional*): SHA-256 of the file it was read from.
        named (`bool`): whether `name` was given or read, and not computed from the contents.
    """

    name: str
    label: str
    config: Any
    modules: dict[str, LoraModule]
    saved: dict[str, Tensor]
    digest: str | None = None
    named: bool = True


@dataclass(frozen=True)
class _Source:
    """An adapter before anything was checked; `name` is `None` where the input has none."""

    name: str | None
    label: str
    config: Any
    state: Mapping[str, Tensor]
    digest: str | None = None


def read_adapters(adapters: Any, names: Sequence[str] | None) -> list[Adapter]:
    """
    Reads adapters and refuses what has no exact low-rank update.

    Args:
        adapters: a list of folders, Hub ids, `(LoraConfig, state_dict)` pairs, `(PeftModel, adapter_name)` pairs and
            `PeftModel`s with a single adapter; or one `PeftModel`, whose adapters (those in `names`) are merged.
        names (`Sequence[str]`, *optional*): names of the tasks; for one `PeftModel`, which of its adapters to merge.

    Returns:
        `list[Adapter]`: in the order given.

    Raises:
        ValueError: for an empty list, a missing or unreadable folder, pickled weights, adapters that are not plain LoRA,
            and tensors that are not finite; the message names the adapter and the way out.
    """
    if isinstance(adapters, PeftModel):
        adapters = [(adapters, name) for name in names or list(adapters.peft_config)]
    elif isinstance(adapters, (str, os.PathLike)) or not isinstance(adapters, Sequence):
        raise ValueError(f"adapters must be a list of adapters or a PeftModel, got {adapters!r}.")
    if not adapters:
        raise ValueError("There is nothing to merge: adapters is empty.")
    sources = [_open(item, index) for index, item in enumerate(adapters)]
    labels = check_names(names, len(sources)) if names is not None else _own_names(sources)
    for source in sources:
        check_config(source.config, source.label)
    parsed = [parse_state(source.config, source.state, source.label) for source in sources]
    named = labels is not None
    return [
        Adapter(name, source.label, source.config, modules, saved, source.digest, named)
        for name, source, (modules, saved) in zip(labels or _content_names(parsed), sources, parsed, strict=True)
    ]


def _own_names(sources: Sequence[_Source]) -> list[str] | None:
    names = [source.name for source in sources if source.name is not None]
    return names if len(set(names)) == len(sources) else None


def _content_names(parsed: Sequence[tuple[dict[str, LoraModule], dict[str, Tensor]]]) -> list[str]:
    """Names from the tensors and scales, so that they do not depend on the order of the inputs."""
    contents: list[dict[str, Tensor]] = []
    for modules, saved in parsed:
        factors = {f"{name}|{part}": getattr(module, part) for name, module in modules.items() for part in "ab"}
        scales = {f"{name}|scale": torch.tensor(module.scale) for name, module in modules.items()}
        contents.append({**factors, **scales, **saved})
    keys = sorted({key for content in contents for key in content})
    absent = torch.empty(0)
    complete = [{key: content.get(key, absent) for key in keys} for content in contents]
    return content_names(complete, [1.0] * len(contents), keys)


def _open(item: Any, index: int) -> _Source:
    if isinstance(item, (str, os.PathLike)):
        return _open_folder(os.fspath(item))
    if isinstance(item, PeftModel):
        item = (item, None)
    if not isinstance(item, Sequence) or len(item) != 2:
        raise ValueError(
            f"Adapter {index} is a {type(item).__name__}; give a folder, a Hub id, a (LoraConfig, state_dict) pair or a "
            "(PeftModel, adapter_name) pair."
        )
    first, second = item
    if isinstance(first, PeftModel):
        return _open_model(first, second)
    if not isinstance(second, Mapping):
        raise ValueError(f"Adapter {index} must be a (LoraConfig, state_dict) pair, got a {type(second).__name__}.")
    return _Source(None, f"adapter {index}", first, second)


def _open_model(model: PeftModel, name: str | None) -> _Source:
    known = list(model.peft_config)
    if name is None and len(known) != 1:
        raise ValueError(f"A PeftModel has the adapters {listed(known)}; say which: (model, adapter_name).")
    name = known[0] if name is None else name
    if name not in known:
        raise ValueError(f"The PeftModel has no adapter {name!r}; it has {listed(known)}.")
    # "auto" would ask the Hub whether the vocabulary was resized.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return _Source(name, name, model.peft_config[name], state)


def _open_folder(path: str) -> _Source:
    folder = Path(path)
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not folder.is_dir():
        config_file, weights_file = (_download(path, name) for name in (CONFIG_NAME, WEIGHTS_NAME))
    elif not config_file.is_file():
        raise ValueError(f"The folder {path!r} has no {CONFIG_NAME}; give a folder that PEFT's save_pretrained wrote.")
    elif not weights_file.is_file():
        raise ValueError(
            f"The adapter {path!r} has no {WEIGHTS_NAME}{_pickle_hint((folder / PICKLE_NAME).is_file())}."
        )
    config = read_config(config_file, path)
    try:
        state = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{WEIGHTS_NAME} of {path!r} is damaged or truncated ({error}); copy it again.") from error
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    return _Source(folder.resolve().name if folder.is_dir() else folder.name, path, config, state, digest)


def _pickle_hint(pickled: bool) -> str:
    if not pickled:
        return ""
    return (
        f", only {PICKLE_NAME}, a pickle, which can run code and is never read; load it once with PEFT and write it again "
        "with save_pretrained, which gives safetensors"
    )


def _download(repository: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:
        # Whatever stands in the way (no such id, no network, not in the cache), the sentence is the same.
        raise ValueError(
            f"{repository!r} is neither a folder nor a Hub adapter whose {name} can be fetched "
            f"({type(error).__name__}); check the path, or that the adapter was saved as safetensors."
        ) from error
