"""What `--push-to-hub` uploads, and when; the Hub itself is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from hf_atm.cli.main import main

from ..merging.checkpoints.testing_utils import write_models


@pytest.fixture
def recipe(tmp_path):
    content = {**write_models(tmp_path), "merge_method": "mean"}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    return str(tmp_path / "recipe.json")


@pytest.fixture
def hub(monkeypatch):
    """Records repositories and the files of every commit."""
    seen = {"repositories": [], "commits": []}

    def create_repo(self, repo_id, private=None, exist_ok=False, **kwargs):
        seen["repositories"].append((repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def upload_folder(self, repo_id, folder_path, commit_message, **kwargs):
        seen["commits"].append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return seen


@pytest.mark.parametrize(("flags", "private"), [([], True), (["--public"], False)])
def test_the_finished_folder_goes_up_in_one_commit(flags, private, recipe, hub, tmp_path):
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", "merged", *flags]) == 0
    assert hub["repositories"] == [("merged", private, True)]
    assert hub["commits"] == [("me/merged", ["README.md", "config.json", "merge_config.json", "model.safetensors"])]


def test_a_dry_run_uploads_nothing(recipe, hub, tmp_path):
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", "merged", "--dry-run"]) == 0
    assert hub == {"repositories": [], "commits": []}


def test_a_failed_upload_leaves_the_merge_on_disk(recipe, hub, tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise OSError("the Hub cannot be reached")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", "merged"]) == 2
    error = capsys.readouterr().err
    assert "the Hub cannot be reached" in error and f"hf upload merged {tmp_path / 'out'}" in error
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("repository", "reason"), [("a/b/c", "no Hub id"), ("merged", "nobody is logged in")])
def test_what_cannot_be_uploaded_is_not_merged(repository, reason, recipe, hub, tmp_path, monkeypatch, capsys):
    def whoami(self):
        raise OSError("nobody is logged in")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    assert main(["merge", recipe, str(tmp_path / "out"), "--push-to-hub", repository]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and hub["repositories"] == []
