"""A support set kept with the model: as in an episode, saved, refreshed."""

from __future__ import annotations

import pytest
import torch

from hf_atm.fewshot import FewShotModel, FewShotTrainer, evaluate_episodes

from .conftest import TinyEncoder, Vectors, collate
from .test_model import bert, conditioned


def rows(data, chosen):
    return {"x": torch.stack([data[row]["x"] for row in chosen])}


@pytest.mark.parametrize("kind", ["plain", "conditioned", "matching"])
def test_samples_are_classified_as_in_an_episode(kind):
    torch.manual_seed(0)
    data = Vectors(apart=2.0)
    model = {
        "plain": lambda: FewShotModel.from_encoder(TinyEncoder(dropout=0.5), scale=0.5),
        "conditioned": lambda: conditioned(0.6, 0.8, dropout=0.5),
        "matching": lambda: FewShotModel.from_encoder(TinyEncoder(dropout=0.5), head="matching"),
    }[kind]()
    # Classes 1, 3 and 4, two samples each, then three queries each.
    index = torch.tensor([[30 * label + i for i in range(5)] for label in (1, 3, 4)])
    model.set_support(data, index[:, :2].flatten(), collate)
    assert model.training and model.config.support["classes"] == [1, 3, 4]
    model.eval()
    logits = model.classify_items(rows(data, index[:, 2:].flatten()))
    wanted = model(rows(data, range(150)), index.unsqueeze(0), 2).logits[0]
    assert torch.allclose(logits, wanted, atol=1e-5)
    # One at a time, since a support set serves any number of samples.
    assert torch.allclose(model.classify_items(rows(data, index[1, 2:3])), wanted[3:4], atol=1e-5)


def test_classes_may_have_different_numbers_of_samples():
    data = Vectors()
    model = FewShotModel.from_encoder(TinyEncoder(), scale="auto").eval()
    model.set_support(data, [0, 30, 31, 32, 60], collate)
    prototypes = [model.encoder(rows(data, chosen)).mean(0) for chosen in ([0], [30, 31, 32], [60])]
    query = model.encoder(rows(data, [33]))
    distances = torch.stack([(query[0] - prototype).square().sum() for prototype in prototypes])
    logits = model.classify_items(rows(data, [33]))[0]
    assert torch.allclose(logits, -model.head.scale * distances, atol=1e-4) and logits.argmax() == 1


def test_an_open_scale_is_set_by_the_support_and_by_no_query():
    data = Vectors()
    models = [FewShotModel.from_encoder(TinyEncoder(), scale="auto").eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.set_support(data, [0, 30, 31, 60], collate)
        assert model.head.calibrated and not model.head.pending
    models[0].classify_items({"x": 100 * data[0]["x"][None]})
    assert models[0].head.scale == models[1].head.scale
    same = FewShotModel.from_encoder(TinyEncoder(), scale="auto").eval()
    same.set_support([{"x": data[0]["x"], "label": label} for label in (0, 1)], item_collator=collate)
    assert same.classify_items(rows(data, [0])).isfinite().all()


def test_an_evaluation_leaves_an_open_scale_open():
    data = Vectors()
    model = FewShotModel.from_encoder(TinyEncoder(), scale="auto")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (evaluate_episodes(model, data, 2, 2, 2, 8, item_collator=collate) for _ in range(2))
    assert first == again and model.head.pending and not model.head.calibrated
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_support_is_saved_and_refreshed_after_a_change_of_weights(tmp_path):
    data = [{"x": row["x"].abs().long(), "label": row["label"]} for row in Vectors(classes=3, each=4)]

    def tokens(batch):
        return {"input_ids": torch.stack([row["x"] for row in batch]) % 30}

    model = FewShotModel.from_encoder(bert(), conditioning=True, gamma_init=0.5, scale=0.5).eval()
    model.set_support(data, [0, 1, 4, 5, 8], tokens)
    before = model.classify_items(tokens(data))
    model.save_pretrained(tmp_path)
    loaded = FewShotModel.from_pretrained(tmp_path).eval()
    assert loaded.config.support["rows"] == [0, 1, 4, 5, 8]
    assert torch.allclose(loaded.classify_items(tokens(data)), before, atol=1e-5)
    # Half way to other weights, as a merge would leave them.
    with torch.no_grad():
        for parameter in loaded.encoder.parameters():
            parameter.mul_(0.5)
    stale = loaded.classify_items(tokens(data))
    loaded.refresh_prototypes(data, tokens)
    fresh = loaded.classify_items(tokens(data))
    assert not torch.allclose(stale, fresh, atol=1e-3)
    loaded.set_support(data, [0, 1, 4, 5, 8], tokens)
    assert torch.equal(loaded.classify_items(tokens(data)), fresh)


def test_training_drops_a_support_set_of_other_weights(settings):
    data = Vectors()
    model = FewShotModel.from_encoder(TinyEncoder())
    model.set_support(data, item_collator=collate)
    FewShotTrainer(model, settings(), collate, data).train()
    with pytest.raises(ValueError, match="no support set; call set_support"):
        model.classify_items(rows(data, [0]))
    assert "support_embeddings" not in model.state_dict()


def test_bad_support_is_refused():
    data = Vectors()
    model = FewShotModel.from_encoder(TinyEncoder())
    with pytest.raises(ValueError, match="holds 1 class"):
        model.set_support(data, [0, 1], collate)
    with pytest.raises(ValueError, match="no support set"):
        model.refresh_prototypes(data, collate)
    model.encoder.per_episode = True
    with pytest.raises(ValueError, match="none can be classified alone"):
        model.set_support(data, None, collate)
