from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_atm.callbacks import ATMCallback
from hf_atm.latent import EmbeddingSet, LatentSpaceCallback

from ..testing_utils import largest_difference, make_data, make_trainer, parameters_of
from .reference import gram_cka, relative


ANCHORS = [3, 17, 5, 30, 22, 9, 11, 2]


def body(model):
    return lambda batch: model.body(batch["features"])


@pytest.fixture
def data():
    return DataLoader(make_data("colour"), batch_size=16)


class Recorder(ATMCallback):
    """Float64 embeddings of every expert and merged model, by the test's own hands."""

    def __init__(self, features):
        self.features, self.experts, self.rounds = features, {}, []

    def embed(self, model):
        with torch.no_grad():
            return model.body(self.features).double().numpy()

    def on_task_end(self, args, state, control, *, round, task, task_vector_norm, **kwargs):
        self.experts[task] = self.embed(kwargs["model"])

    def on_round_end(self, args, state, control, *, round, report, **kwargs):
        self.rounds.append((self.embed(kwargs["model"]), dict(self.experts)))


def test_records_are_cka_to_the_mean_of_the_experts_spaces(tmp_path, data):
    features = data.dataset["features"][:]
    reference = np.random.default_rng(0).normal(size=(40, 4))
    space = EmbeddingSet("joint", range(40), reference)
    callback = LatentSpaceCallback(data, ANCHORS, reference=space, encoder=body)
    recorder = Recorder(features)
    make_trainer(tmp_path, callbacks=[recorder, callback]).train()
    rest = [row for row in range(40) if row not in ANCHORS]
    assert [entry["round"] for entry in callback.history] == [0, 1, 2]
    for entry, (merged, experts) in zip(callback.history, recorder.rounds, strict=True):
        assert len(experts) == 3
        cosines = relative(merged, merged[ANCHORS])[rest]
        mean = np.mean([relative(rows, rows[ANCHORS])[rest] for rows in experts.values()], axis=0)
        plain = np.mean([rows[rest] for rows in experts.values()], axis=0)
        assert entry["experts"] == pytest.approx(gram_cka(cosines, mean), abs=1e-5)
        assert entry["experts_absolute"] == pytest.approx(gram_cka(merged[rest], plain), abs=1e-5)
        joint = relative(reference, reference[ANCHORS])[rest]
        assert entry["reference"] == pytest.approx(gram_cka(cosines, joint), abs=1e-5)
    assert json.loads((tmp_path / "latent_spaces.json").read_text()) == callback.history


def test_the_order_of_the_data_does_not_matter_when_samples_have_ids(tmp_path, data):
    rows = [{"features": row["features"], "id": f"s{n:02d}"} for n, row in enumerate(data.dataset)]
    anchors = [f"s{n:02d}" for n in ANCHORS]
    histories = []
    for shuffle in (False, True):
        callback = LatentSpaceCallback(DataLoader(rows, batch_size=7, shuffle=shuffle), anchors, encoder=body)
        make_trainer(tmp_path / str(shuffle), callbacks=[callback], num_rounds=1).train()
        histories.append(callback.history[0])
    assert histories[0]["experts"] == pytest.approx(histories[1]["experts"], abs=1e-6)
    assert histories[0]["experts_absolute"] == pytest.approx(histories[1]["experts_absolute"], abs=1e-6)


def test_the_run_is_not_touched(tmp_path, data):
    plain, watched = (
        make_trainer(tmp_path / "a"),
        make_trainer(
            tmp_path / "b", callbacks=[LatentSpaceCallback(data, 6, reference=body_of_a_new_model(), encoder=body)]
        ),
    )
    plain.train()
    watched.train()
    assert largest_difference(parameters_of(plain.model), parameters_of(watched.model)) == 0


def body_of_a_new_model():
    return lambda batch: batch["features"] @ torch.ones(6, 3).cumsum(0)


def test_anchors_are_chosen_when_only_a_number_is_given(tmp_path, data):
    callbacks = [LatentSpaceCallback(data, count, encoder=body) for count in (6, 256)]
    make_trainer(tmp_path, callbacks=callbacks, num_rounds=1).train()
    assert [len(callback.anchors) for callback in callbacks] == [6, 20]
    assert callbacks[0].history[0]["reference"] is None and 0 < callbacks[0].history[0]["experts"] <= 1


def test_a_resumed_run_keeps_its_history(tmp_path, data):
    whole = LatentSpaceCallback(data, ANCHORS, encoder=body)
    make_trainer(tmp_path / "a", callbacks=[whole]).train()

    class Stop(ATMCallback):
        def on_step_end(self, args, state, control, **kwargs):
            # In the second task of the second round.
            control.should_save = control.should_training_stop = state.global_step == 20

    settings = {"save_strategy": "epoch"}
    cut = LatentSpaceCallback(data, ANCHORS, encoder=body)
    make_trainer(tmp_path / "b", callbacks=[cut, Stop()], **settings).train()
    assert [entry["round"] for entry in cut.history] == [0]
    resumed = LatentSpaceCallback(data, ANCHORS, encoder=body)
    make_trainer(tmp_path / "b", callbacks=[resumed], **settings).train(resume_from_checkpoint=True)
    assert resumed.history[0] == whole.history[0]
    assert resumed.history[1] == {"round": 1, "experts": None, "experts_absolute": None, "reference": None}
    assert resumed.history[2]["experts"] == pytest.approx(whole.history[2]["experts"], abs=1e-6)


def test_bad_input_is_found_before_the_first_step(tmp_path, data):
    for anchors, message in (([1], "1 anchors were given"), (1, "anchors is 1"), ([1, 1], "more than once")):
        with pytest.raises(ValueError, match=message):
            LatentSpaceCallback(data, anchors)
    short = EmbeddingSet("joint", range(39), torch.rand(39, 3))
    for callback, message in (
        (LatentSpaceCallback(data, [1, 99], encoder=body), "lacks the ids 99"),
        (LatentSpaceCallback(data, ANCHORS, short, encoder=body), "the space 'joint' lacks the ids 39"),
    ):
        trainer = make_trainer(tmp_path, callbacks=[callback])
        with pytest.raises(KeyError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
