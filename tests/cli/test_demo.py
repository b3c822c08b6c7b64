from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForImageClassification, pipeline

from hf_atm import MultiTaskModel
from hf_atm.cli import demo, demo_data
from hf_atm.cli.main import main


@pytest.fixture(scope="module")
def data():
    return demo_data.build_data(seed=0)


def test_data(data):
    base, train, test = data
    assert base[0].shape[1:] == (16, 16, 3)
    assert base[0].dtype == np.uint8
    assert set(base[1]) == set(range(demo_data.BASE_LABELS))
    assert list(train) == list(test) == list(demo_data.QUESTIONS) == list(demo_data.LABELS)
    for part in (train, test):
        for task, (images, labels) in part.items():
            assert len(images) == len(labels) > 400
            assert set(labels) == set(range(len(demo_data.LABELS[task])))


def test_no_image_is_both_tuned_and_tested(data):
    base, train, test = data
    for task in ("digit", "photo"):
        seen = {image.tobytes() for image in train[task][0]}
        assert not seen & {image.tobytes() for image in test[task][0]}
    digits = {image.tobytes() for image, label in zip(*base, strict=True) if label < 10}
    assert not digits & {image.tobytes() for image in (*train["digit"][0], *test["digit"][0])}
    bands = [set(bands) for bands in demo_data._BANDS.values()]
    assert len(set.union(*bands)) == sum(map(len, bands)) == 10


def test_data_depends_on_the_seed_alone(data):
    again, other = demo_data.build_data(seed=0), demo_data.build_data(seed=1)
    assert np.array_equal(again[2]["turn"][1], data[2]["turn"][1])
    assert not np.array_equal(other[2]["turn"][1], data[2]["turn"][1])


def test_a_short_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_BASE_STEPS", 4)
    folder = tmp_path / "some" / "demo"
    arguments = ["demo", "--output", str(folder), "--rounds", "2", "--steps", "2", "--quiet"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    for row in ("pretrained (probe)", "one-shot merge", "ATM, round 1", "ATM, round 2", "experts, one each"):
        assert row in output
    facts = json.loads((folder / "demo.json").read_text())
    assert set(facts["scores"]["one-shot merge"]) == set(demo_data.QUESTIONS)
    assert len(json.loads((folder / "atm_report.json").read_text())["rounds"]) == 2
    assert set(MultiTaskModel.from_pretrained(folder).heads) == set(demo_data.QUESTIONS)
    stock = AutoModelForImageClassification.from_pretrained(folder / "tasks" / "photo")
    assert stock.config.id2label == {0: "china", 1: "flower"}
    answer = pipeline("image-classification", model=str(folder / "tasks" / "digit"))(str(folder / "digit.png"))
    assert answer[0]["label"] in demo_data.LABELS["digit"]

    first = facts["scores"]
    assert main(arguments) == 0
    assert json.loads((folder / "demo.json").read_text())["scores"] == first


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "holds something other than a demo's model; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert main(["demo", "--output", str(tmp_path / "new"), "--rounds", "0"]) == 2
    assert not (tmp_path / "new").exists()


def test_long_runs_show_every_other_round():
    rows = {f"ATM, round {r}": {} for r in range(1, 21)}
    shown = list(demo._readable(rows, 20))
    assert shown == ["ATM, round 1", *(f"ATM, round {r}" for r in range(2, 21, 2))]
    assert len(demo._readable({f"ATM, round {r}": {} for r in range(1, 11)}, 10)) == 10
