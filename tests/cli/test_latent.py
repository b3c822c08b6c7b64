"""`hf-atm latent`: the space it saves is that of the models, computed here by hand; wrong files end in one sentence."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

from hf_atm import MultiTaskModel
from hf_atm.cli.main import main
from hf_atm.latent import LatentSpace

from ..latent.reference import centroid_accuracy, gram_cka, relative, separability


@pytest.fixture
def write(tmp_path, encoder, decoder, text_data):
    def write(**changes):
        content = {
            "data_root": "data",
            "data": {"dataset": "tone", "eval_split": "test"},
            "models": {"bert": "encoder", "llama": {"model": "decoder"}},
            "anchors": {"num_anchors": 6, "strategy": "balanced"},
            "batch_size": 5,
            "output_dir": str(tmp_path / "out"),
        } | changes
        path = tmp_path / "latent.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write


def embed(folder, texts, last):
    """Sentence by sentence, so that there is no padding."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            batch = tokenizer(text, return_tensors="pt")
            batch.pop("token_type_ids", None)
            states = model(**batch).last_hidden_state[0].double()
        rows.append((states[-1] if last else states.mean(0)).numpy())
    return np.array(rows)


@pytest.fixture
def texts(text_data):
    parts = {
        part: datasets.Dataset.from_parquet(str(text_data / "tone" / f"{part}.parquet")) for part in ("train", "test")
    }
    return [*parts["train"]["text"], *parts["test"]["text"]], [*parts["train"]["label"], *parts["test"]["label"]]


def test_the_space_and_its_metrics(write, tmp_path, texts, capsys):
    assert main(["latent", write(reference="encoder"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    space = LatentSpace.load(tmp_path / "out" / "latent_space.safetensors")
    result = json.loads((tmp_path / "out" / "latent_metrics.json").read_text())["spaces"]
    sentences, labels = texts
    names = [f"train/{n:07d}" for n in range(32)] + [f"eval/{n:07d}" for n in range(8)]
    row_of = {name: row for row, name in enumerate(names)}
    assert sorted(names) == space.ids.tolist() and space.tasks == ["bert", "llama"]
    anchors = [row_of[name] for name in space.anchors.tolist()]
    assert max(anchors) < 32 and sorted(labels[row] for row in anchors) == [0, 0, 0, 1, 1, 1]
    plain = {
        name: embed(tmp_path / folder, sentences, last)
        for name, folder, last in (("bert", "encoder", False), ("llama", "decoder", True))
    }
    merged = np.mean([relative(rows, rows[anchors]) for rows in plain.values()], axis=0)
    order = [row_of[name] for name in space.ids.tolist()]
    np.testing.assert_allclose(space.embeddings, merged[order], atol=2e-5)
    assert space.labels.tolist() == [labels[row] for row in order]

    fit = [row for row in range(32) if row not in anchors]
    score = list(range(32, 40))
    classes = np.array(labels)
    assert list(result) == ["merged (2 spaces)", "bert", "llama", "mean of embeddings", "reference"]
    spaces = {"merged (2 spaces)": merged, **plain, "mean of embeddings": (plain["bert"] + plain["llama"]) / 2}
    for name, rows in spaces.items():
        values = result[name]
        assert values["cka_merged"] == pytest.approx(gram_cka(rows[score], merged[score]), abs=1e-4)
        assert values["cka_reference"] == pytest.approx(gram_cka(rows[score], plain["bert"][score]), abs=1e-4)
        assert values["separability"] == pytest.approx(separability(rows[score], classes[score]), rel=1e-3)
        assert values["centroid"] == centroid_accuracy(rows[fit], classes[fit], rows[score], classes[score])
        assert f"{values['probe']:.3f}" in printed and name in printed
    assert result["reference"] == result["bert"]


def test_multi_task_models_and_the_oracle(write, tmp_path, texts):
    torch.manual_seed(1)
    MultiTaskModel.from_backbone(str(tmp_path / "encoder"), tasks={"a": {"num_labels": 2}}).save_pretrained(
        tmp_path / "multi"
    )
    AutoTokenizer.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "multi")
    models = {"bert": {"model": "multi", "labels": ["n"]}, "llama": {"model": "decoder", "labels": [1]}}
    for routing, scored in (("oracle", True), ("knn", False)):
        assert main(["latent", write(models=models, routing=routing), "--quiet"]) == 0
        space = LatentSpace.load(tmp_path / "out" / "latent_space.safetensors")
        plain = [name in space.anchors.tolist() for name in space.ids.tolist()]
        for name, label, sources, anchor in zip(
            space.ids.tolist(), space.labels.tolist(), space.sources.tolist(), plain, strict=True
        ):
            if name.startswith("train/") or scored:
                assert sources == [label == 0, label == 1]
            assert sum(sources) == 1 or anchor


def test_images(tmp_path, image_data):
    for size, name in ((8, "small"), (12, "large")):
        torch.manual_seed(size)
        config = ViTConfig(
            image_size=size,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / name)
    content = {
        "data": {"dataset": str(image_data / "colour"), "max_eval_examples": 6},
        "models": {
            "small": {"model": "./small", "image": {"size": 8}, "pooling": "cls"},
            "large": {"model": "./large", "image": {"size": 12}},
        },
        "anchors": {"num_anchors": 4},
    }
    (tmp_path / "latent.yaml").write_text(yaml.safe_dump(content))
    assert main(["latent", str(tmp_path / "latent.yaml"), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    space = LatentSpace.load(tmp_path / "out" / "latent_space.safetensors")
    assert len(space) == 22 and space.embeddings.shape[1] == 4


def test_numbers_for_labels_leave_cka(write, tmp_path):
    data = {"dataset": "likeness", "eval_split": "test"}
    assert main(["latent", write(data=data, anchors={"num_anchors": 5}), "--quiet"]) == 0
    result = json.loads((tmp_path / "out" / "latent_metrics.json").read_text())["spaces"]
    assert {tuple(values) for values in result.values()} == {("cka_merged",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modells": {}}, "config has the unknown key 'modells'; did you mean 'models'?"),
        ({"models": {}}, "config names no model"),
        ({"data": None}, "config lacks the key 'data'"),
        ({"data": {"dataset": "tone", "eval_split": None}}, "data needs train_split"),
        ({"models": {"a": {"pooling": "cls"}}}, "models.a lacks the key 'model'"),
        ({"models": {"a": "./nowhere"}}, "model './nowhere' is not a folder"),
        ({"models": {"a": {"model": "encoder", "pooling": "max"}}}, "models.a.pooling is 'max'; known ones are auto"),
        (
            {"models": {"a": {"model": "encoder", "layer": "top"}}},
            "models.a.layer is 'top'; it must be a whole number",
        ),
        ({"models": {"a": {"model": "encoder", "labels": "n"}}}, "models.a.labels must list the labels"),
        ({"models": {"a": {"model": "encoder", "labels": ["x"]}}}, "has the unknown label 'x'; the labels are n, p"),
        ({"models": {"reference": "encoder"}}, "a model is called 'reference'"),
        ({"anchors": {"number": 4}}, "anchors has the unknown key 'number'"),
        ({"anchors": {"num_anchors": 1}}, "anchors.num_anchors is 1; it must be a whole number from 2"),
        ({"anchors": {"strategy": "best"}}, "anchors.strategy is 'best'; known ones are random, balanced"),
        ({"anchors": {"num_anchors": 32}}, "num_anchors is 32, and train_split 'train' has 32 rows"),
        ({"data": {"dataset": "likeness"}}, "anchors.strategy 'balanced' needs classes"),
        ({"data": {"dataset": "tone", "eval_split": "train[:10%]"}}, "data.eval_split 'train[:10%]' share rows"),
        ({"models": {"a": {"model": "encoder", "labels": [["n"]]}}}, "models.a.labels must be names or numbers"),
        (
            {"routing": "oracle", "models": {"a": {"model": "encoder", "labels": ["n"]}}},
            "routing 'oracle' needs every label in some model's task, and none lists 'p'",
        ),
        ({"routing": "best"}, "routing is 'best'; known ones are average, knn, mahalanobis, confidence, oracle"),
        (
            {"routing": "knn"},
            "needs to know what each model was trained on; list the labels of its task under models.bert",
        ),
        ({"duplicates": "last"}, "duplicates is 'last'; known ones are mean, first"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number from 1"),
        ({"standardize": "perhaps"}, "standardize is 'perhaps'; it must be true or false"),
        ({"data_root": "nowhere"}, "data_root 'nowhere' is not a folder"),
    ],
)
def test_a_wrong_file_is_one_sentence(write, tmp_path, capsys, monkeypatch, changes, message):
    # Nothing is embedded before all is looked at.
    monkeypatch.setattr("hf_atm.cli.latent.extract_embeddings", None)
    assert main(["latent", write(**changes)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_classes_of_one_scored_sample_have_no_spread(write, tmp_path, text_data, capsys):
    path = text_data / "tone" / "test.parquet"
    rows = datasets.Dataset.from_parquet(str(path))
    labels = rows["label"][:]
    keep = [labels.index(0), labels.index(1)]
    rows.select(keep).to_parquet(str(path))
    assert main(["latent", write(), "--quiet"]) == 0
    spaces = json.loads((tmp_path / "out" / "latent_metrics.json").read_text())["spaces"]
    assert all("separability" not in values and "probe" in values for values in spaces.values())
    assert (tmp_path / "out" / "latent_space.safetensors").is_file() and "separability" not in capsys.readouterr().out


def test_what_is_scored_standardises_nothing(write, tmp_path, text_data):
    path = text_data / "tone" / "test.parquet"
    rows = datasets.Dataset.from_parquet(str(path))
    assert main(["latent", write(standardize=True), "--quiet"]) == 0
    whole = LatentSpace.load(tmp_path / "out" / "latent_space.safetensors")
    rows.select([0, 2, 3, 4, 5, 6, 7]).to_parquet(str(path))
    assert main(["latent", write(standardize=True, output_dir=str(tmp_path / "less")), "--quiet"]) == 0
    less = LatentSpace.load(tmp_path / "less" / "latent_space.safetensors")
    first = ["eval/0000000", *whole.anchors.tolist()]
    assert torch.allclose(whole.select(first).embeddings, less.select(first).embeddings, atol=1e-5)


def test_the_example_is_valid(monkeypatch):
    from pathlib import Path

    from hf_atm.cli import experiment, latent

    monkeypatch.setattr(latent, "resolve_reference", lambda reference, folder: reference)
    monkeypatch.setattr(experiment.Path, "is_dir", lambda self: True)
    config = latent.read_latent_config(Path(__file__).parents[2] / "examples" / "latent" / "encoders.yaml")
    assert [encoder.name for encoder in config.encoders] == ["minilm", "stories"] and config.num_anchors == 256
