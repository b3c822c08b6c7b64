"""Uploads, against a server that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from hf_atm import hub as hub_module
from hf_atm.hub import card_mark, check_upload, files_to_push, push

from .hub_server import OURS, READER, Fault


@pytest.fixture
def folder(tmp_path):
    """What a run leaves: model, card, pictures, exports, and what is nobody else's business."""
    root = tmp_path / "run"
    for name, content in {
        "config.json": "{}",
        "README.md": f'{card_mark("run")}\n# run\n\nload("run"), not "running"\n',
        "figures/rounds.svg": "<svg/>",
        "tasks/a/config.json": "{}",
        "checkpoint-10/optimizer.json": "{}",
        "_staging/half.json": "{}",
        ".cache/x.json": "{}",
        "model.safetensors.tmp": "half",
        "training_args.bin": "a pickle",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    for name in ("model.safetensors", "tasks/a/model.safetensors"):
        save_file({"w": torch.arange(6.0) + len(name)}, str(root / name))
    return root


EXPECTED = ["README.md", "config.json", "figures/rounds.svg", "model.safetensors", "tasks/a/config.json"]
EXPECTED += ["tasks/a/model.safetensors"]


def digests(folder):
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_private_commit_holds_the_whole_folder_and_nothing_local_changes(hub, folder):
    before = digests(folder)
    commit = push(folder, "run-on-the-hub")
    (repository,) = hub.repositories.items()
    assert repository[0] == "me/run-on-the-hub" and repository[1].private
    assert [entry["summary"] for entry in repository[1].commits] == ["Upload from hf-atm"]
    files = repository[1].branches["main"]
    assert sorted(files) == EXPECTED
    for name in EXPECTED:
        if name != "README.md":
            assert files[name] == (folder / name).read_bytes()
    assert commit.commit_url.startswith(hub.endpoint)
    assert digests(folder) == before


def test_the_cards_code_loads_from_the_repository(hub, folder):
    push(folder, "lab/other")
    card = hub.repositories["lab/other"].branches["main"]["README.md"].decode()
    assert 'load("lab/other"), not "running"' in card and '"run"' not in card
    # A card of somebody's own goes up as it is.
    (folder / "README.md").write_text('load("run")')
    push(folder, "lab/own")
    assert hub.repositories["lab/own"].branches["main"]["README.md"] == b'load("run")'


def test_the_record_of_a_merge_names_no_folder_of_this_machine(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned" / "one").mkdir(parents=True)
    recipe = {"base_model": "google-bert/bert-base-uncased", "models": [{"model": str(tmp_path / "a"), "weight": 1.5}]}
    record = {
        "recipe": recipe,
        "inputs": {"one": {"model": "tuned/one"}, "two": {"model": "./b/two", "revision": None}},
        "notes": ["a ratio of 1/2 was kept"],
    }
    (folder / "merge_config.json").write_text(json.dumps(record))
    config = {"_name_or_path": str(tmp_path / "start"), "backbone_config": {"_name_or_path": "./start"}, "act": "."}
    (folder / "config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "google-bert/bert-base-uncased"})
    )
    push(folder, "lab/merged")
    files = hub.repositories["lab/merged"].branches["main"]
    assert json.loads(files["config.json"]) == {
        "_name_or_path": "start",
        "backbone_config": {"_name_or_path": "start"},
        "act": ".",
        "base_model_name_or_path": "google-bert/bert-base-uncased",
    }
    assert files["tasks/a/config.json"] == b"{}"
    pushed = json.loads(hub.repositories["lab/merged"].branches["main"]["merge_config.json"])
    assert pushed["recipe"] == {**recipe, "models": [{"model": "a", "weight": 1.5}]}
    assert pushed["inputs"] == {"one": {"model": "one"}, "two": {"model": "two", "revision": None}}
    assert pushed["notes"] == record["notes"] and json.loads((folder / "merge_config.json").read_text()) == record


def test_public_on_request_and_a_branch_of_its_own(hub, folder):
    push(folder, "me/open", private=False, revision="round-3", commit_message="Three rounds")
    repository = hub.repositories["me/open"]
    assert not repository.private and repository.branches["main"] == {}
    assert sorted(repository.branches["round-3"]) == EXPECTED
    assert [(c["summary"], c["branch"]) for c in repository.commits] == [("Three rounds", "round-3")]


def test_a_second_upload_sends_only_what_changed(hub, folder):
    push(folder, "me/run")
    (folder / "config.json").write_text('{"changed": 1}')
    stored = [line for line in hub.requests if line.startswith("PUT")]
    push(folder, "me/run")
    assert [line for line in hub.requests if line.startswith("PUT")] == stored
    assert hub.repositories["me/run"].branches["main"]["config.json"] == b'{"changed": 1}'
    assert len(hub.repositories["me/run"].commits) == 2


@pytest.mark.parametrize("status", [500, 503, 429, 0])
@pytest.mark.parametrize("place", ["repos/create", "/commit/"])
def test_faults_that_pass_are_waited_out(hub, folder, place, status):
    hub.faults.append(Fault(place, status, times=hub_module.ATTEMPTS - 1))
    push(folder, "me/run")
    assert sorted(hub.repositories["me/run"].branches["main"]) == EXPECTED
    assert len(hub.repositories["me/run"].commits) == 1


def test_a_fault_that_stays_is_told_with_what_is_on_the_hub(hub, folder, tmp_path):
    hub.faults.append(Fault("/commit/", 500, times=99))
    with pytest.raises(OSError, match="me/run exists, and nothing was committed to it.*hf-atm push") as error:
        push(folder, "me/run", token=OURS)
    assert OURS not in str(error.value)
    assert hub.repositories["me/run"].branches["main"] == {}
    hub.faults.clear()
    hub.faults.append(Fault("repos/create", 500, times=99))
    with pytest.raises(OSError, match="nothing was uploaded"):
        push(folder, "me/never")
    assert "me/never" not in hub.repositories


def test_tokens_that_will_not_do(hub, folder, monkeypatch):
    with pytest.raises(OSError, match="does not accept the token; run `hf auth login`") as error:
        push(folder, "me/run", token="hf_wrongToken123")
    assert "hf_wrongToken123" not in str(error.value)
    with pytest.raises(OSError, match="the token may not write there"):
        push(folder, "me/run", token=READER)
    assert hub.repositories == {}
    with pytest.raises(OSError, match="does not accept the token"):
        check_upload("me/run", token="hf_wrongToken123")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(OSError, match="nobody is logged in; run `hf auth login`, or set HF_TOKEN"):
        check_upload("me/run")


def test_no_token_reaches_what_is_uploaded_or_asked_for(hub, folder):
    push(folder, "me/run", token=OURS)
    assert all(OURS.encode() not in content for content in hub.repositories["me/run"].branches["main"].values())
    assert not any(OURS in line for line in hub.requests)


def test_somebody_elses_repository_is_refused_before_work(hub):
    check_upload("run")
    check_upload("Lab/run")
    with pytest.raises(ValueError, match="namespace of 'them'.*'me' may not write; choose me/run, lab/run"):
        check_upload("them/run")
    with pytest.raises(ValueError, match="'a/b/c' is no Hub id such as"):
        check_upload("a/b/c")


def test_no_network(hub, folder, monkeypatch):
    from huggingface_hub import constants

    hub.close()
    with pytest.raises(OSError, match=r"the Hub at http://127.0.0.1:\d+ cannot be reached"):
        check_upload("me/run")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set; unset it"):
        push(folder, "me/run")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        files_to_push(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no model .* save one there first"):
        files_to_push(tmp_path)


def test_tasks_may_have_names_that_are_left_out_at_the_top(folder):
    for name in ("_mine", "checkpoint-1"):
        (folder / "tasks" / name).mkdir()
        (folder / "tasks" / name / "config.json").write_text("{}")
    names = [str(path) for path in files_to_push(folder)]
    assert {"tasks/_mine/config.json", "tasks/checkpoint-1/config.json"} <= set(names)
    assert not any(name.startswith(("_", "checkpoint-")) for name in names)


def test_what_is_left_out(folder):
    assert [str(path) for path in files_to_push(folder)] == EXPECTED
    assert json.loads((folder / "config.json").read_text()) == {}
