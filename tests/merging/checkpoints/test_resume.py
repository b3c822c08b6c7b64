"""A merge that is killed leaves nothing under its name, and the next one goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from hf_atm.merging import merge_checkpoints
from hf_atm.merging.checkpoints import run as run_module

from ..testing_utils import assert_same
from .testing_utils import load_checkpoint, write_models


KILL = """
import os, signal, sys
from hf_atm.merging import merge_checkpoints
from hf_atm.merging.checkpoints import run, staging
add, done = staging.Journal.add, []

def add_and_die(self, phase, key, **facts):
    add(self, phase, key, **facts)
    done.append(key)
    if phase == sys.argv[3] and len(done) >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

staging.Journal.add = add_and_die
merge_checkpoints(sys.argv[1], sys.argv[2], threads=1, progress=False)
"""


@pytest.fixture
def recipe(tmp_path):
    content = write_models(tmp_path)
    content |= {"merge_method": "ties", "parameters": {"density": 0.4, "scaling_coefficient": "norm"}}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    return tmp_path / "recipe.json"


def count_work(monkeypatch):
    done = []
    for name in ("_vectors", "_write"):
        work = getattr(run_module.Run, name)
        monkeypatch.setattr(
            run_module.Run, name, lambda self, step, work=work, name=name: (done.append(name), work(self, step))[1]
        )
    return done


@pytest.mark.parametrize(("phase", "after"), [("vectors", 2), ("write", 9)])
def test_killed_and_continued(phase, after, recipe, tmp_path, monkeypatch):
    merge_checkpoints(recipe, tmp_path / "whole", progress=False)
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(recipe), str(tmp_path / "out"), phase, str(after)], timeout=120
    )
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists() and (tmp_path / "out.incomplete").is_dir()
    done = count_work(monkeypatch)
    report = merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert report.resumed and len(done) == 13 - after
    assert_same(load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "whole"))
    whole, resumed = (json.loads((tmp_path / name / "merge_config.json").read_text()) for name in ("whole", "out"))
    assert whole == resumed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def interrupted(recipe, tmp_path, monkeypatch, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_note_inputs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_checkpoints(recipe, tmp_path / "out", progress=False, **kwargs)
    assert not (tmp_path / "out").exists()


def test_another_recipe_or_other_inputs_start_afresh(recipe, tmp_path, monkeypatch):
    content = json.loads(recipe.read_text())
    interrupted(content, tmp_path, monkeypatch)
    report = merge_checkpoints({**content, "parameters": {"density": 0.3}}, tmp_path / "out", progress=False)
    assert not report.resumed and not (tmp_path / "out.incomplete").exists()
    shutil.rmtree(tmp_path / "out")
    interrupted(content, tmp_path, monkeypatch)
    os.utime(tmp_path / "m1" / "model.safetensors", ns=(0, 0))
    assert not merge_checkpoints(content, tmp_path / "out", progress=False).resumed


def test_bytes_that_did_not_reach_the_disk_are_written_again(recipe, tmp_path, monkeypatch):
    merge_checkpoints(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("hf_atm.merging.checkpoints.merge.check_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_checkpoints(recipe, tmp_path / "out", progress=False)
    file = tmp_path / "out.incomplete" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-30:] = bytes(30)
    file.write_bytes(content)
    done = count_work(monkeypatch)
    report = merge_checkpoints(recipe, tmp_path / "out", progress=False)
    assert report.resumed and 0 < done.count("_write") < 7 and "_vectors" not in done
    assert_same(load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "whole"))
