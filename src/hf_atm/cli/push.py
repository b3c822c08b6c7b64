"""`hf-atm push`: a finished folder to the Hub, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hub import check_upload, files_to_push, push
from .console import size


def push_folder(folder: str, repo_id: str, options: Any, quiet: bool = False) -> int:
    """Uploads what a run or a merge left.

    Args:
        folder (`str`): Its folder.
        repo_id (`str`): Hub id.
        options (`argparse.Namespace`): The command's options.
        quiet (`bool`, *optional*, defaults to `False`): Print nothing.

    Returns:
        `int`: 0.
    """
    names = files_to_push(Path(folder))
    nbytes = sum((Path(folder) / name).stat().st_size for name in names)
    if not quiet:
        if options.dry_run:
            print("\n".join(map(str, names)))
        print(f"{len(names)} files, {size(nbytes)}")
        if not (Path(folder) / "README.md").is_file():
            print(f"note: there is no model card; `hf-atm card {folder}` writes one for a run")
    if options.dry_run:
        return 0
    check_upload(repo_id)
    commit = push(
        folder, repo_id, not options.public, revision=options.revision, commit_message=options.commit_message
    )
    if not quiet:
        print(commit.commit_url)
    return 0
