"""Uploads of finished folders to the Hub: looked at before long work, one commit, retried, private unless asked."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# Hidden and unfinished files; training_args.bin is a pickle, and that of other trainers may hold a token.
LEFT_OUT = (".*", "*.tmp", "*.incomplete", "training_args.bin")
# What a run keeps to itself lies at its top; further down, a task may have such a name.
LEFT_OUT_AT_TOP = ("checkpoint-*", "_*")
MERGE_RECORD = "merge_config.json"
# Where transformers and PEFT write down what a model came from.
_CONFIGS = ("config.json", "adapter_config.json")
_SOURCES = ("_name_or_path", "base_model_name_or_path", "backbone_name_or_path", "name_or_path")
_MODELS = ("config.json", "adapter_config.json", "*.safetensors")
ATTEMPTS = 3
_CARD_MARK = re.compile(r'<!-- Written by hf-atm for "([^"\n]+)"')
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_T = TypeVar("_T")


def card_mark(repository: str) -> str:
    """The line in a card by which hf-atm knows its own, and what the card's code loads.

    Args:
        repository (`str`): Hub id or folder.
    """
    return f'<!-- Written by hf-atm for "{repository}". Without this line hf-atm leaves the file alone. -->'


def written_by_hf_atm(card: str) -> str | None:
    """What the code of a card of ours loads; `None` for a card of somebody else.

    Args:
        card (`str`): its text.
    """
    found = _CARD_MARK.search(card)
    return found.group(1) if found else None


def check_upload(repo_id: str, token: str | None = None) -> None:
    """
    Finds out before long work whether its result can be uploaded: the id is one, and belongs to whom the token does.

    Args:
        repo_id (`str`): Hub id; without a namespace, the user's.
        token (`str`, *optional*): the one that is logged in by default.

    Raises:
        `ValueError`: for an id that the Hub does not take, or another's namespace.
        `OSError`: without a token, for one that is not valid, or where the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no Hub id such as 'me/merged': {error}") from error
    try:
        known = HfApi().whoami(token=token)
    except Exception as error:
        raise OSError(f"{repo_id!r} cannot be uploaded to: {_reason(error, token)}") from error
    owners = [known["name"], *(org["name"] for org in known.get("orgs", []))]
    owner = repo_id.split("/")[0]
    if "/" in repo_id and owner.lower() not in map(str.lower, owners):
        allowed = ", ".join(f"{name}/{repo_id.split('/')[1]}" for name in owners)
        raise ValueError(
            f"{repo_id!r} is in the namespace of {owner!r}, where the token of {known['name']!r} may not write; choose "
            f"{allowed}."
        )


def files_to_push(folder: Path, leave_out: Sequence[str] = ()) -> list[Path]:
    """
    What an upload takes: everything but checkpoints, hidden, private and unfinished files, and pickled arguments.

    Args:
        folder (`Path`): a run's or a merge's.
        leave_out (`Sequence[str]`, *optional*): patterns of further names at its top.

    Returns:
        `list[Path]`: sorted, relative to the folder.

    Raises:
        `FileNotFoundError`: when the folder is missing or holds no model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}; name the folder of a run or a merge.")
    if not any(any(folder.glob(pattern)) for pattern in _MODELS):
        raise FileNotFoundError(f"{str(folder)!r} holds no model ({', '.join(_MODELS)}); save one there first.")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    top = (*LEFT_OUT_AT_TOP, *leave_out)
    return sorted(
        path
        for path in found
        if not _matches(path.parts[0], top) and not any(_matches(part, LEFT_OUT) for part in path.parts)
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = True,
    *,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload from hf-atm",
    path_in_repo: str = "",
    leave_out: Sequence[str] = (),
) -> CommitInfo:
    """
    Uploads a finished folder to the Hub in one commit. Nothing in the folder is changed.

    A card that hf-atm wrote says in the repository that its code loads from there, whatever it says in the folder;
    configurations and the record of a merge name folders of this machine by their last name alone. The commit is made whole or not at all; errors that may pass (network, limits, faults of the server) are retried.

    Args:
        folder (`str` or `PathLike`): the folder.
        repo_id (`str`): Hub id; made if it does not exist.
        private (`bool`, *optional*, defaults to `True`): whether it becomes private then.
        token (`str`, *optional*): the one that is logged in by default.
        revision (`str`, *optional*): branch to commit to, made if it does not exist; the main one by default.
        commit_message (`str`, *optional*): what the history says.
        path_in_repo (`str`, *optional*): folder of the repository; its top by default.
        leave_out (`Sequence[str]`, *optional*): as in [`files_to_push`].

    Returns:
        `CommitInfo`: with the commit's address.

    Raises:
        `FileNotFoundError`: for a folder without a model.
        `OSError`: if the upload fails; says what is on the Hub by then, and how to try again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, api = Path(folder), HfApi()
    names = files_to_push(folder, leave_out)
    state = "nothing was uploaded"
    try:
        repo = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True, token=token))
        full = repo.repo_id
        state = f"the repository {full} exists, and nothing was committed to it"
        if revision is not None:
            _retried(lambda: api.create_branch(full, branch=revision, exist_ok=True, token=token))
        operations = [
            CommitOperationAdd(
                (PurePosixPath(path_in_repo) / name.as_posix()).as_posix(), _content(folder / name, full)
            )
            for name in names
        ]
        return _retried(
            lambda: api.create_commit(full, operations, commit_message=commit_message, token=token, revision=revision)
        )
    except Exception as error:
        raise OSError(
            f"{str(folder)!r} is whole, but its upload to {repo_id!r} failed, and {state}: {_reason(error, token)} "
            f"Try again with: hf-atm push {folder} {repo_id}"
        ) from error


def on_hub(source: str | None) -> bool:
    """Whether a model's name is a Hub id rather than a folder."""
    return (
        source is not None
        and source.count("/") == 1
        and not source.startswith((".", "/", "~"))
        and not os.path.exists(source)
    )


def public_name(source: str) -> str:
    """A Hub id as it is, and the last name of a folder: the rest of its path is nobody's business."""
    return source if on_hub(source) else Path(source).name


def _content(path: Path, repo_id: str) -> str | bytes:
    """A file's path, or what the repository says instead: our card's code loads from there, folders are last names."""
    if path.name == "README.md":
        text = path.read_text(encoding="utf-8")
        loads = written_by_hf_atm(text)
        return str(path) if loads is None else text.replace(f'"{loads}"', f'"{repo_id}"').encode()
    if path.name in (MERGE_RECORD, *_CONFIGS):
        found = json.loads(path.read_text(encoding="utf-8"))
        known = _without_folders(found, None if path.name == MERGE_RECORD else _SOURCES)
        if known != found:
            return (json.dumps(known, indent=2) + "\n").encode()
    return str(path)


def _without_folders(value: Any, keys: Sequence[str] | None, key: str = "") -> Any:
    """The same with folders, anywhere or under certain keys, by their last name alone."""
    if isinstance(value, dict):
        return {name: _without_folders(part, keys, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part, keys, key) for part in value]
    is_folder = isinstance(value, str) and (value.startswith((".", "/", "~")) or os.path.exists(value))
    return public_name(value) if is_folder and (keys is None or key in keys) else value


def _retried(call: Callable[[], _T]) -> _T:
    """A call's value; errors that may pass are waited out a few times."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not _may_pass(error):
                raise
            time.sleep(2.0 ** (attempt - 1))
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # The client's own errors of the connection; its name differs between versions of the Hub's library.
    return not isinstance(error, OfflineModeIsEnabled) and type(error).__module__.split(".")[0].startswith("httpx")


def _reason(error: Exception, token: str | None) -> str:
    """One sentence on an error, without tokens."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is logged in; run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it."
    if status == 401:
        return "the Hub does not accept the token; run `hf auth login` with one that may write."
    if status == 403:
        return "the token may not write there; use one with write access, or another repository."
    if status is None and _may_pass(error):
        return f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})."
    text = " ".join(str(error).split())
    if token:
        text = text.replace(token, "[token]")
    return _TOKEN.sub("[token]", text).rstrip(".") + "."
