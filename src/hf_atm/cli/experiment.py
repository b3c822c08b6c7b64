"""A whole experiment from one YAML file: model, tasks and settings, every name checked before anything is loaded."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..config import ATMConfig
from ..continual.settings import ContinualSettings, check_stages
from ..tasks import TaskSpec


_TOP_KEYS = (
    "model",
    "tasks",
    "task_defaults",
    "training",
    "data_root",
    "export_tasks",
    "compare",
    "schedule",
    "continual",
)
_COMPARE_KEYS = ("members", "seeds", "steps")
_MODEL_KEYS = ("backbone", "config", "causal_lm", "pooling", "peft", "image")
IMAGE_KEYS = ("size", "channels", "mean", "std")
_TASK_KEYS = tuple(f.name for f in fields(TaskSpec) if f.name != "name")


@dataclass
class Experiment:
    """What a YAML file says, checked but not yet loaded.

    Args:
        model (`dict`): One of `backbone`, `config` (a new model) or `causal_lm`, and `pooling`, `peft`, `image`.
        tasks (`dict[str, TaskSpec]`): The tasks, in the file's order.
        args (`ATMConfig`): The run's settings.
        export_tasks (`bool`): Save a stock model per task beside the merged one.
        compare (`dict`): Members, seeds and steps of a comparison; empty if the file names none.
        schedule (`list[list[str]]`): For each stage of continual ATM, the tasks that are new in it; empty if all tasks
            are there from the start.
        continual (`dict`): Settings of continual ATM, for [`ContinualSettings`].
    """

    model: dict[str, Any]
    tasks: dict[str, TaskSpec]
    args: ATMConfig
    export_tasks: bool = False
    compare: dict[str, Any] = field(default_factory=dict)
    schedule: list[list[str]] = field(default_factory=list)
    continual: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model and these tasks from others; settings of the run not included."""
        return {"model": self.model, "tasks": {name: asdict(task) for name, task in self.tasks.items()}}


def read_experiment(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks a YAML file.

    Args:
        path (`str` or `os.PathLike`): The file. Environment variables in its values are expanded; relative folders are
            looked up from `data_root`, and that from the file's own folder.
        overrides (`Sequence[str]`, *optional*): Command line arguments `--field value` that replace settings.

    Raises:
        FileNotFoundError: If the file or `data_root` does not exist.
        ValueError: If the file is not valid YAML, or a key is unknown or missing; the message names the known ones.
    """
    raw, folder, root = read_yaml(path, _TOP_KEYS, required=("model", "tasks"))
    model = dict(as_mapping("model", raw["model"]))
    check_keys("model", model, _MODEL_KEYS)
    sources = [key for key in ("backbone", "config", "causal_lm") if key in model]
    if len(sources) != 1:
        raise ValueError(f"model needs exactly one of backbone, config and causal_lm, and has {len(sources)} of them")
    if "image" in model:
        check_keys("model.image", model["image"], IMAGE_KEYS)
    for key in ("backbone", "causal_lm"):
        if key in model:
            model[key] = resolve_reference(model[key], folder)

    defaults = as_mapping("task_defaults", raw.get("task_defaults") or {})
    check_keys("task_defaults", defaults, _TASK_KEYS)
    tasks = {
        str(name): read_task(
            f"tasks.{name}", str(name), {**defaults, **as_mapping(f"tasks.{name}", entry or {})}, root
        )
        for name, entry in as_mapping("tasks", raw["tasks"]).items()
    }
    if not tasks:
        raise ValueError("config names no task; add at least one under tasks")

    training = dict(as_mapping("training", raw.get("training") or {}))
    # The Trainer takes silenced libraries for a wish to see no progress.
    training.setdefault("disable_tqdm", False)
    if all(task.eval_split for task in tasks.values()):
        training.setdefault("eval_strategy", "epoch")
    comparison = dict(as_mapping("compare", raw.get("compare") or {}))
    check_keys("compare", comparison, _COMPARE_KEYS)
    args = parse_training(training, overrides)
    schedule = check_stages(raw["schedule"], list(tasks)) if raw.get("schedule") else []
    continual = dict(as_mapping("continual", raw.get("continual") or {}))
    ContinualSettings.parse(continual)
    if continual and not schedule:
        raise ValueError(
            "config has continual settings but no schedule; list the stages, such as schedule: [[a, b], c]"
        )
    return Experiment(
        model, tasks, args, bool(raw.get("export_tasks", False)), comparison, schedule=schedule, continual=continual
    )


def read_yaml(
    path: str | os.PathLike, known: Sequence[str], required: Sequence[str] = ()
) -> tuple[dict[str, Any], Path, Path]:
    """A YAML file, environment variables in its values expanded and its top-level keys checked.

    Returns:
        What it holds, its folder, and the folder that `data_root` names, the file's own by default.

    Raises:
        FileNotFoundError: If the file or `data_root` does not exist.
        ValueError: If the file is not valid YAML, or a key is unknown or missing; the message names the known ones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config {str(path)!r} does not exist; see examples/configs for a start")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config {str(path)!r} is not valid YAML: {error}") from error
    raw = _expand(raw)
    check_keys("config", raw, known, required)
    folder = path.resolve().parent
    root = _joined(folder, raw.get("data_root") or ".")
    if not root.is_dir():
        raise FileNotFoundError(f"data_root {raw['data_root']!r} is not a folder (looked for {root})")
    return raw, folder, root


def read_task(where: str, name: str, entry: Mapping[str, Any], root: Path) -> TaskSpec:
    """A task from its entry in a file, its data looked up from `root`; `where` names it in errors."""
    check_keys(where, entry, _TASK_KEYS, required=("dataset",))
    return TaskSpec(name=name, **{**entry, "dataset": resolve_dataset(str(entry["dataset"]), root)})


def parse_training(training: Mapping[str, Any], overrides: Sequence[str] = (), config_class: Any = ATMConfig) -> Any:
    """Builds the settings from a file's values and the command line's, which win.

    Text in the file is read as the command line would read it, so that `1e-5`, text to YAML, is a number.

    Args:
        training (`Mapping[str, Any]`): The file's.
        overrides (`Sequence[str]`, *optional*): The command line's, `--field value`.
        config_class (`type`, *optional*, defaults to [`ATMConfig`]): What to build.

    Raises:
        ValueError: If a field is unknown or its value cannot be read.
    """
    parser, names = _field_parser(config_class=config_class)
    values = {
        **parse_settings(training, config_class=config_class),
        **vars(_parse(parser, names, overrides, config_class)),
    }
    return config_class(**values)


def parse_settings(
    settings: Mapping[str, Any], where: str = "training", config_class: Any = ATMConfig
) -> dict[str, Any]:
    """Fields of `config_class` from a file, text among them read as the command line would read it.

    Raises:
        ValueError: If a field is unknown or its value cannot be read; `where` says in which section.
    """
    parser, names = _field_parser(where, config_class)
    check_keys(where, settings, names, fields_of=config_class)
    words = [word for name, value in settings.items() if isinstance(value, str) for word in (f"--{name}", value)]
    return {**settings, **vars(_parse(parser, names, words, config_class))}


def _field_parser(where: str = "training", config_class: Any = ATMConfig) -> tuple[_FieldParser, list[str]]:
    parser = _FieldParser(config_class, allow_abbrev=False, add_help=False)
    parser.where = where
    for action in parser._actions:
        # Only what was given counts; everything else is left to the dataclass.
        action.default = argparse.SUPPRESS
    return parser, [f.name for f in fields(config_class) if f.init]


def resolve_reference(reference: str, folder: Path) -> str:
    """A model's place: `package:module/sub/folder`, a folder (relative to `folder`), or else a Hub id as it stands.

    Raises:
        FileNotFoundError: If the package is not installed or has no such folder, or a path that is plainly local does
            not exist.
    """
    if reference.startswith("package:"):
        module, _, rest = reference.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise FileNotFoundError(
                f"model {reference!r}: the Python package {module!r} is not installed; "
                f"try pip install {module.replace('_', '-')}"
            )
        path = Path(found.origin).parent / rest
        if not path.is_dir():
            raise FileNotFoundError(f"model {reference!r}: the package has no folder {rest!r}")
        return str(path)
    path = _joined(folder, reference)
    if path.is_dir():
        return str(path)
    if reference.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model {reference!r} is not a folder (looked for {path})")
    return reference


class _FieldParser(HfArgumentParser):
    where = "training"

    def error(self, message: str) -> Any:
        raise ValueError(f"{self.where}: {message}")


def _parse(parser: _FieldParser, names: Sequence[str], words: Sequence[str], config_class: Any) -> argparse.Namespace:
    values, rest = parser.parse_known_args(list(words))
    if rest:
        unknown = rest[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown setting {rest[0]!r}{_suggest(unknown, names, config_class)}")
    return values


def _joined(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / Path(path).expanduser()))


def resolve_dataset(dataset: str, root: Path) -> str:
    """A data set's place: below `root` if there is such a path, else as it stands, perhaps a Hub id."""
    path = _joined(root, dataset)
    return str(path) if path.exists() or dataset.startswith((".", "/", "~")) else dataset


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.expandvars(value)
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    return value


def as_mapping(where: str, value: Any) -> Mapping[str, Any]:
    """`value`, if it is a mapping; `where` names it in the error."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must hold keys and values, not {value!r}")
    return value


def check_keys(
    where: str, value: Any, known: Sequence[str], required: Sequence[str] = (), fields_of: Any = ATMConfig
) -> None:
    """Refuses unknown and missing keys, with the nearest known one as a hint."""
    value = as_mapping(where, value)
    for key in value:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {str(key)!r}{_suggest(str(key), known, fields_of)}")
    for key in required:
        if key not in value:
            raise ValueError(f"{where} lacks the key {key!r}")


def _suggest(key: str, known: Sequence[str], fields_of: Any) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?" + (f" (known: {', '.join(known)})" if len(known) <= 20 else "")
    shown = ", ".join(sorted(known)) if len(known) <= 20 else f"the fields of hf_atm.{fields_of.__name__}"
    return f"; known: {shown}"
