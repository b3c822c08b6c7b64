"""Pictures show the numbers they were given: read back from the SVG's text and from matplotlib's own objects."""

from __future__ import annotations

import os
import re

import pytest
from PIL import Image

from hf_atm.analysis import Landscape
from hf_atm.figures import draw_cosines, draw_interference, draw_landscape, draw_rounds, draw_scores
from hf_atm.figures.canvas import canvas


def record(index, experts=True):
    return {
        "round": index,
        "tasks": ["cola", "sst2"],
        "scores": {"cola": 0.1 * index, "sst2": 0.5 + 0.1 * index},
        "expert_scores": {"cola": 0.4, "sst2": 0.9} if experts else {},
        "metric_names": {"cola": "matthews_correlation", "sst2": "accuracy"},
    }


def texts(path):
    return re.findall(r">([^<>\n]+)</text>", path.with_suffix(".svg").read_text(encoding="utf-8"))


def is_a_picture(path):
    with Image.open(path.with_suffix(".png")) as image:
        pixels = image.convert("L")
        return min(image.size) > 300 and len(pixels.getcolors()) > 20


def test_rounds(tmp_path):
    target = tmp_path / "rounds"
    assert draw_rounds([record(0), record(1), record(2)], target, {"joint training": 0.55})
    shown = texts(target)
    assert {"cola", "sst2", "average, merged", "average, round's experts", "joint training", "round"} <= set(shown)
    assert "each task's first metric, validation" in shown and is_a_picture(target)
    assert not draw_rounds([{**record(0), "scores": {}}], tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["rounds.png", "rounds.svg"]


def test_rounds_without_experts_of_one_metric(tmp_path):
    records = [{**record(0, experts=False), "metric_names": {"cola": "accuracy", "sst2": "accuracy"}}]
    assert draw_rounds(records, tmp_path / "rounds")
    assert "accuracy, validation" in texts(tmp_path / "rounds")
    assert "average, round's experts" not in texts(tmp_path / "rounds")


def test_cosines(tmp_path):
    target = tmp_path / "cosines"
    draw_cosines({"a": {"a": 1.0, "b": -0.123}, "b": {"a": -0.123, "b": 1.0}}, target)
    shown = [text.replace("\N{MINUS SIGN}", "-") for text in texts(target)]
    assert shown.count("-0.12") == 2 and shown.count("1.00") == 2 and shown.count("a") == 2
    assert is_a_picture(target)
    draw_cosines({"alone": {"alone": 1.0}}, tmp_path / "alone")
    assert "alone" in texts(tmp_path / "alone")


def test_interference_by_layer(tmp_path):
    layers = {
        f"encoder.layer.{depth}.{kind}.weight": {"interference": depth + 1.0, "norms": {"a": 1.0, "b": 1.0}}
        for depth in range(3)
        for kind in ("query", "key")
    }
    layers["encoder.layer.0.query.bias"] = {"interference": None, "norms": {"a": 1.0}}
    layers["pooler.weight"] = {"interference": 0.0, "norms": {"a": 0.0, "b": 0.0}}
    target = tmp_path / "interference"
    assert draw_interference(layers, target)
    assert {"encoder.layer.*.query", "encoder.layer.*.key", "pooler", "layer"} <= set(texts(target))
    assert is_a_picture(target)
    assert not draw_interference({"bias": {"interference": None, "norms": {}}}, tmp_path / "none")


@pytest.mark.parametrize("height", [1.0, 0.05])
def test_landscape(tmp_path, height):
    landscape = Landscape(
        x=[0.0, 1.0, 2.0],
        y=[0.0, height],
        losses=[[3.0, 2.0, 1.0], [2.5, 1.5, float("inf")]],
        corners=[(0.0, 0.0), (2.0, 0.0), (1.0, height)],
        corner_losses=[3.0, 1.0, 1.5],
        path=[(0.0, 0.0, 0.0), (1.0, 0.1 * height, 0.2)],
    )
    target = tmp_path / "landscape"
    draw_landscape(landscape, ["pretrained", "merged", "expert"], target, "mean loss")
    shown = texts(target)
    assert {"pretrained (3.000)", "merged (1.000)", "expert (1.500)", "rounds", "mean loss"} <= set(shown)
    assert "L2 distance from pretrained towards merged" in shown and is_a_picture(target)


def test_a_flat_landscape(tmp_path):
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    flat = Landscape([0.0, 1.0], [0.0, 1.0], [[1.0, 1.0], [1.0, 1.0]], corners, [1.0] * 3, [])
    draw_landscape(flat, "abc", tmp_path / "flat")
    assert "a (1.000)" in texts(tmp_path / "flat")


def test_scores(tmp_path):
    rows = {"experts": {"a": 0.8, "b": 0.5, "c": 0.01}, "merged": {"a": 0.6, "b": 0.5, "c": 0.0}}
    target = tmp_path / "scores"
    assert draw_scores(rows, target)
    shown = texts(target)
    assert {"a", "b", "merged", "score / score of experts"} <= set(shown) and "c" not in shown
    assert draw_scores({"merged": rows["merged"]}, tmp_path / "plain") and "c" in texts(tmp_path / "plain")
    assert not draw_scores({"experts": rows["experts"]}, tmp_path / "none") and not draw_scores({}, tmp_path / "none")
    assert is_a_picture(target)


def test_the_same_numbers_give_the_same_files(tmp_path):
    contents = []
    for name in ("one", "two"):
        draw_cosines({"a": {"a": 1.0}}, tmp_path / name)
        contents.append([(tmp_path / name).with_suffix(suffix).read_bytes() for suffix in (".png", ".svg")])
    assert contents[0] == contents[1]


def test_nothing_half_written(tmp_path):
    with pytest.raises(ZeroDivisionError), canvas(tmp_path / "broken"):
        raise ZeroDivisionError
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"), canvas(tmp_path / "file" / "figure.png"):
        pass
    assert os.listdir(tmp_path) == ["file"]
