from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_atm.cli.console import size
from hf_atm.cli.main import main
from hf_atm.merging import read_recipe

from ..merging.checkpoints.testing_utils import load_checkpoint, write_models


RECIPES = sorted((Path(__file__).resolve().parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    content = {**write_models(tmp_path), "merge_method": "task_arithmetic"}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    return str(tmp_path / "recipe.json")


def test_merge_prints_what_it_did(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", recipe, str(out), "--out-dtype", "bfloat16", "--max-shard-size", "200"]) == 0
    output = capsys.readouterr()
    assert "task_arithmetic: m0, m1, m2" in output.out and "7 tensors (6 merged, 1 taken over)" in output.out
    assert "bfloat16" in output.out and f"written to {out}" in output.out and output.err == ""
    assert len(load_checkpoint(out)) == 7


def test_dry_run_and_quiet(recipe, tmp_path, capsys):
    assert main(["merge", recipe, str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "model.embed_tokens.weight 40x6" in text and "model.scale scalar" in text
    assert "of disk" in text and "of memory" in text and "nothing was written" in text
    assert not (tmp_path / "out").exists()
    assert main(["--quiet", "merge", recipe, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == ""


def test_errors_are_one_sentence(recipe, tmp_path, capsys):
    assert main(["merge", str(tmp_path / "no.yaml"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"hf-atm: error: Recipe '{tmp_path / 'no.yaml'}' does not exist.\n"
    assert main(["merge", recipe, str(tmp_path / "m0")]) == 2
    error = capsys.readouterr().err
    assert "already holds" in error and error.count("\n") == 1


def test_neither_transformers_nor_peft_is_imported(recipe, tmp_path):
    code = (
        "import sys\nfrom hf_atm.cli.main import main\n"
        f"assert main(['merge', {recipe!r}, {str(tmp_path / 'out')!r}]) == 0\n"
        "heavy = {'transformers', 'peft', 'accelerate', 'datasets', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_sizes():
    assert [size(n) for n in (12, 1200, 3_400_000, 5_600_000_000)] == ["12 bytes", "1.2 KB", "3.4 MB", "5.60 GB"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_example_recipes_are_valid(path):
    assert read_recipe(path).models
