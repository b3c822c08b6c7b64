"""The examples of alignment run on small generated pictures, and what they write holds together."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "alignment"
MODULES = ("measure", "networks", "pictures", "train")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 8 x 8, grey and in colour, whose class is where they are bright."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, shape in (("grey", (8, 8)), ("colour", (8, 8, 3))):
        (folder / name).mkdir()
        for split, count in (("train", 120), ("test", 60)):
            labels = np.arange(count) % 4
            pixels = draw.integers(0, 120, (count, *shape), dtype=np.uint8)
            for picture, label in zip(pixels, labels, strict=True):
                picture[2 * label : 2 * label + 2] += 120
            columns = {"image": [png(picture) for picture in pixels], "label": labels.tolist()}
            pq.write_table(pa.table(columns), folder / name / f"{split}.parquet")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, data):
    """Runs a script of the folder in this process; returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--data", str(data), "--device", "cpu"])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    precision = torch.get_float32_matmul_precision()
    yield script
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = False
    for module in MODULES:
        sys.modules.pop(module, None)


def trained(run, tmp_path, network, dataset, seeds=(0, 1, 2), epochs=2):
    where = ("--dataset", dataset, "--output", tmp_path, "--epochs", epochs, "--batch-size", 20)
    text = run("train.py", network, "--seeds", *seeds, *where)
    return tmp_path / dataset / network, text, lambda: run("train.py", network, "--seeds", *seeds, *where)


def test_mlps_are_trained_once_and_measured_in_every_way(run, tmp_path):
    folder, text, again = trained(run, tmp_path, "mlp-24-16", "grey", epochs=12)
    assert text.count("test accuracy") == 3 and again().count("exists") == 3

    text = run("merge.py", folder, "--methods", "naive", "git-rebasin", "merge-many", "c2m3", "activations")
    merged = json.loads((folder / "merge.json").read_text())["merged"]
    assert list(merged) == ["naive", "git-rebasin", "merge-many", "c2m3", "activations"]
    assert merged["c2m3"]["loss"] < merged["naive"]["loss"]
    assert f"| c2m3 | {merged['c2m3']['accuracy']:.3f} |" in text

    run("curves.py", folder, "--steps", 5)
    curves = json.loads((folder / "curves.json").read_text())
    assert curves["c2m3"]["barrier"] < curves["naive"]["barrier"]
    # The ends compute the same in every frame, repaired or not.
    for arm in curves.values():
        assert arm["losses"][0] == pytest.approx(curves["naive"]["losses"][0], abs=1e-5)
        assert arm["losses"][-1] == pytest.approx(curves["naive"]["losses"][-1], abs=1e-5)
    assert (folder / "curves.png").stat().st_size > 0

    run("cycle.py", folder)
    cycle = json.loads((folder / "cycle.json").read_text())
    assert cycle["c2m3"][0]["fixed"] == 1.0 and cycle["c2m3"][0]["midpoint"] == cycle["c2m3"][0]["A"]
    assert cycle["git-rebasin"][0]["fixed"] < 1.0

    run("stability.py", folder, "--runs", 2)
    stability = json.loads((folder / "stability.json").read_text())
    first, second = stability["c2m3"]["orders"]
    assert first == second


@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_resnets_are_merged_and_repaired(run, tmp_path, norm):
    folder, text, _ = trained(run, tmp_path, f"resnet8-{norm}-x1", "colour", seeds=(0, 1))
    run("merge.py", folder, "--methods", "naive", "git-rebasin", "--repair", 40)
    merged = json.loads((folder / "merge.json").read_text())["merged"]
    assert text.count("test accuracy") == 2 and set(merged) == {"naive", "git-rebasin"}
    assert all(0 <= value["accuracy, REPAIR"] <= 1 for value in merged.values())


def test_vits_are_merged_and_tuned(run, tmp_path):
    folder, _, _ = trained(run, tmp_path, "vit-16-1", "grey", seeds=(0, 1))
    text = run("transformers_from_seeds.py", folder, "--steps", 0, 4, "--batch-size", 20, "--repaired")
    tuning = json.loads((folder / "tuning.json").read_text())
    assert all(len(tuning[start][0]) == 2 for start in ("c2m3", "activations", "naive", "random"))
    assert "| mean of two, steps of tuning | 0 | 4 |" in text
