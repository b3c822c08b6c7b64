"""Uploads of finished merges to the Hub."""

from __future__ import annotations

import os


def check_upload(repo_id: str) -> None:
    """
    Finds out before long work whether its result can be uploaded: the id is one, and somebody is logged in.

    Args:
        repo_id (`str`): Hub id; without a namespace, the user's.

    Raises:
        `ValueError`: for an id that the Hub does not take.
        `OSError`: without a token, for one that is not valid, or where the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={repo_id!r} is no Hub id such as 'me/merged': {error}") from error
    HfApi().whoami()


def push(folder: str | os.PathLike, repo_id: str, private: bool = True) -> str:
    """
    Uploads a finished folder to the Hub in one commit.

    Args:
        folder (`str` or `PathLike`): the folder.
        repo_id (`str`): Hub id; made if it does not exist.
        private (`bool`, *optional*, defaults to `True`): whether it becomes private then.

    Returns:
        `str`: the commit's address.

    Raises:
        `OSError`: if the upload fails; it says how to try again without merging again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repo.repo_id, folder_path=str(folder), commit_message="Merged with hf-atm")
        )
    except Exception as error:
        raise OSError(
            f"The merge is whole in {str(folder)!r}, but the upload to {repo_id!r} failed ({error}); try again with: "
            f"hf upload {repo_id} {folder}"
        ) from error
