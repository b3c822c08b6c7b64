"""`hf-atm fewshot`: base classes, novel classes, one table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file

from hf_atm.cli.fewshot import few_shot_table, read_few_shot
from hf_atm.cli.main import main
from hf_atm.fewshot import FewShotModel

from .conftest import WORDS


@pytest.fixture
def topics(tmp_path):
    """Texts of five classes, each of two words of its own."""
    generator = np.random.default_rng(0)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c", "d", "e"])})
    folder = tmp_path / "data" / "topics"
    folder.mkdir(parents=True)
    for split, each in (("train", 12), ("validation", 10)):
        labels = np.repeat(np.arange(5), each)
        texts = [" ".join(generator.choice(WORDS[2 * label : 2 * label + 2], 3)) for label in labels]
        Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(
            str(folder / f"{split}.parquet")
        )


@pytest.fixture
def config(tmp_path, encoder, topics):
    def write(**changes):
        content = {
            "data_root": "data",
            "model": {"backbone": "encoder", "pooling": "mean"},
            "data": {"dataset": "topics", "base": ["a", "b", "c"], "novel": ["d", "e"]},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "n_way": 2,
                "k_shot": 2,
                "n_query": 3,
                "episodes_per_epoch": 8,
                "eval_episodes": 10,
                "per_device_train_batch_size": 4,
                "num_train_epochs": 1,
                "learning_rate": "1e-3",
                "scale": "auto",
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
            },
            "test_episodes": 20,
            "baselines": ["untrained", "finetune"],
        }
        training = changes.pop("training", {})
        content.update(changes)
        content["training"].update(training)
        path = tmp_path / "few.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def test_a_run_prints_a_table_and_leaves_models(config, tmp_path, capsys):
    assert main(["fewshot", config(seeds=[0, 1]), "--quiet"]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("2-way 2-shot"))
    rows = [line.split("  ")[0] for line in lines[start + 2 : start + 5]]
    assert rows == ["fine-tuned classifier", "before training", "trained"]
    assert "±" in lines[start + 2] and "2 (" in lines[start + 2]
    result = json.loads((tmp_path / "run" / "few_shot.json").read_text())
    assert set(result["rows"]["trained"]) == {"0", "1"}
    for seed in (0, 1):
        model = FewShotModel.from_pretrained(tmp_path / "run" / f"seed-{seed}")
        assert model.encoder.pooling == "mean" and model.head.scale != 1
        assert (tmp_path / "run" / f"seed-{seed}" / "tokenizer.json").is_file()


def test_the_command_line_replaces_settings(config, tmp_path):
    experiment = read_few_shot(config(), ["--k_shot", "1", "--conditioning", "true"])
    assert (experiment.args.k_shot, experiment.args.conditioning, experiment.seeds) == (1, True, [42])
    assert experiment.args.learning_rate == 1e-3 and experiment.args.scale == "auto"
    assert experiment.data["dataset"] == str(tmp_path / "data" / "topics")


def test_a_graph_set_trains(config, tmp_path, capsys):
    pytest.importorskip("torch_geometric", reason="install the extra `graphs`")
    from tests.fewshot.test_graphs import write

    folder = tmp_path / "data" / "letters"
    folder.mkdir()
    write(folder, split={"train": [1], "test": [2, 3]}, train=(0,), test=(1, 2))
    path = config(
        model={"encoder": "gin", "hidden_size": 12},
        data={"graphs": "letters", "walk_length": 3},
        baselines=["node_statistics"],
        training={"k_shot": 1, "n_query": 1},
    )
    assert main(["fewshot", path]) == 2
    assert "episodes of 2 classes need 2 of them, and there are 1" in capsys.readouterr().err
    write(folder, split={"train": [1, 2], "test": [3]}, train=(0, 1), test=(2,))
    assert main(["fewshot", path]) == 2
    write(folder, split={"train": [1, 2], "test": [3, 4]}, train=(0, 1), test=(2, 3), names=("1", "2", "3", "4"))
    assert main(["fewshot", path, "--quiet"]) == 0
    assert "node statistics" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["encoder"]["in_features"] == 2 + 3
    path = config(model={"encoder": "gin"}, data={"graphs": "letters", "walk_length": "long"})
    assert main(["fewshot", path, "--quiet"]) == 2
    assert "walk_length is 'long'; it must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"graphs": "x", "dataset": "y"}}, "exactly one of graphs, tu_dataset and dataset, and has 2"),
        ({"data": {"dataset": "topics", "base": ["a"]}}, "data lacks the key 'novel'"),
        (
            {"data": {"dataset": "topics", "base": ["a", "b"], "novel": ["b", "c"]}},
            "classes b are both base and novel",
        ),
        ({"data": {"dataset": "topics", "base": ["a", "b"], "novel": ["z", "c"]}}, "data.novel names the class 'z'"),
        (
            {"data": {"dataset": "topics", "base": ["a"], "novel": "de"}},
            "data.novel must be a list of classes, not 'de'",
        ),
        (
            {"data": {"dataset": "topics", "base": ["a", "b", "c"], "novel": ["d", "e"], "k_shot": 7}},
            "data has the unknown key 'k_shot'",
        ),
        ({"model": {"backbone": "encoder", "pooling": "max"}}, "pooling is 'max'; known: cls, mean"),
        ({"training": {"head": "protonet"}}, "head is 'protonet'; known: matching, prototypical"),
        ({"training": {"scale": -1}}, "scale is -1"),
        ({"training": {"distance": "l2"}}, "distance is 'l2'"),
        ({"seeds": [0, 0]}, "seeds must differ, not [0, 0]"),
        (
            {"seeds": [0, 1], "training": {"resume_from_checkpoint": "run/seed-0/checkpoint-2"}},
            "belongs to one of 2 seeds",
        ),
        (
            {"model": {"encoder": "gin", "norm": "episode"}, "data": {"graphs": "topics"}, "baselines": ["finetune"]},
            "the baseline finetune needs embeddings of single graphs",
        ),
        ({"model": {"backbone": "encoder", "layers": 2}}, "model has the unknown key 'layers'"),
        ({"model": {"encoder": "gin"}}, "model has the unknown key 'encoder'"),
        ({"model": {"encoder": "gat"}, "data": {"graphs": "g"}}, "model.encoder is 'gat'"),
        ({"baselines": ["magic"]}, "baselines has the unknown entry 'magic'"),
        ({"baselines": ["node_statistics"]}, "node_statistics is for graphs"),
        ({"seeds": 3}, "seeds must be a list of whole numbers"),
        ({"test_episodes": 1}, "test_episodes is 1"),
        ({"training": {"n_ways": 3}}, "training has the unknown key 'n_ways'; did you mean 'n_way'?"),
        ({"training": {"n_way": 4}}, "train data: episodes of 4 classes need 4 of them, and there are 3"),
        (
            {"training": {"k_shot": 8}},
            "validation data: class 0 has 10 samples, and an episode takes 8 + 3 of each class",
        ),
        ({"episodes": 3}, "config has the unknown key 'episodes'"),
    ],
)
def test_bad_input_is_one_sentence(config, capsys, changes, message):
    assert main(["fewshot", config(**changes, **({} if "baselines" in changes else {"baselines": []}))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_all_is_looked_at_before_any_baseline_runs(config, capsys, monkeypatch):
    for name in ("finetune_baseline", "evaluate_episodes"):
        monkeypatch.setattr(f"hf_atm.cli.fewshot.{name}", None)
    assert main(["fewshot", config(training={"mixup_weight": 0.1, "head": "matching"})]) == 2
    assert "latent MixUp needs prototypes" in capsys.readouterr().err


def test_seeds_go_on_from_their_own_checkpoints(config, tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 2}
    path = config(seeds=[0], training=settings, baselines=[])
    assert main(["fewshot", path, "--output_dir", str(tmp_path / "run" / "seed-0"), "--quiet"]) == 0
    alone = load_file(tmp_path / "run" / "seed-0" / "model.safetensors")
    path = config(seeds=[0, 1], training=settings, baselines=[])
    assert main(["fewshot", path, "--resume_from_checkpoint", "true", "--quiet"]) == 0
    first, second = (load_file(tmp_path / "run" / f"seed-{seed}" / "model.safetensors") for seed in (0, 1))
    assert all(torch.equal(first[name], alone[name]) for name in alone)
    assert any(not torch.equal(first[name], second[name]) for name in alone)


def test_the_table_has_means_over_seeds():
    rows = {
        "x": {0: {"accuracy": 0.5, "ci95": 0.02, "macro_f1": 0.4}, 1: {"accuracy": 0.7, "ci95": 0.04, "macro_f1": 0.6}}
    }
    line = few_shot_table(rows, "4-way 1-shot").splitlines()[-1].split()
    assert line == ["x", "0.600", "±", "0.030", "0.500", "2", "(0.141)"]
