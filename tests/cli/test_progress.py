"""The bar names round and task and shows the merged score; without a terminal there is none."""

from __future__ import annotations

import shutil

from transformers.utils import logging

from hf_atm.cli import progress
from hf_atm.cli.experiment import read_experiment
from hf_atm.cli.main import main

from .conftest import training


class Bar:
    """Keeps what a bar would show."""

    made = []

    def __init__(self, total, initial, **settings):
        self.total, self.done, self.settings, self.shown, self.closed = total, initial, settings, [], False
        Bar.made.append(self)

    def update(self):
        self.done += 1

    def set_description(self, text):
        self.shown.append(text)

    def set_postfix_str(self, text):
        self.shown.append(text)

    def close(self):
        self.closed = True


def test_one_bar_over_all_rounds(config, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    path = str(config())
    settings = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--disable_tqdm", "false"]
    assert main(["train", path, *settings]) == 0
    (bar,) = Bar.made
    assert bar.done == bar.total > 0 and bar.closed and bar.settings["disable"] is None
    scores = [text for text in bar.shown if text.startswith("merged ")]
    places = [text for text in bar.shown if text not in scores]
    assert places == [f"round {r}/2, {task}" for r in (1, 2) for task in ("likeness", "tone")]
    assert len(scores) == 2 and bar.shown[2] == scores[0]
    # A run that goes on starts where it stopped.
    shutil.rmtree(max((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])))
    assert main(["train", path, *settings, "--resume_from_checkpoint", "true"]) == 0
    again = Bar.made[1]
    assert again.done == again.total == bar.total and again.shown[0].startswith("round 2/2")


def test_no_bar_without_a_terminal(config, capsys):
    path = str(config())
    assert main(["train", path, "--num_rounds", "1", "--eval_strategy", "epoch", "--disable_tqdm", "false"]) == 0
    seen = capsys.readouterr()
    assert "it/s" not in seen.err and "\r" not in seen.err + seen.out and "Round 1/1" in seen.out


def test_no_bar_when_it_is_turned_off(config, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    path = str(config())
    assert main(["train", path, "--num_rounds", "1", "--disable_tqdm", "false", "--quiet"]) == 0
    assert main(["train", path, "--num_rounds", "1", "--output_dir", str(tmp_path / "other")]) == 0
    assert Bar.made == []


def test_silenced_libraries_do_not_silence_the_bar(config, tmp_path):
    settings = training(tmp_path)
    del settings["disable_tqdm"]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        assert read_experiment(config(training=settings)).args.disable_tqdm is False
    finally:
        logging.set_verbosity(level)
