from __future__ import annotations

import pytest
import yaml

from hf_atm import ATMConfig
from hf_atm.cli.experiment import parse_training, read_experiment, resolve_reference
from hf_atm.cli.workbench import build_peft_config

from .conftest import training


def test_reads_a_file(config, tmp_path):
    experiment = read_experiment(config())
    assert isinstance(experiment.args, ATMConfig)
    assert experiment.args.learning_rate == 1e-3
    assert experiment.args.eval_strategy == "epoch"
    assert experiment.model["backbone"] == str(tmp_path / "encoder")
    assert experiment.tasks["tone"].dataset == str(tmp_path / "data" / "tone")
    assert experiment.tasks["likeness"].metrics == ["spearmanr", "mse"]
    assert not experiment.export_tasks


def test_overrides_win_and_are_typed(config):
    words = '--num_rounds 7 --merge_method ties --merge_kwargs {"density":0.5} --load_best_model_at_end'.split()
    args = read_experiment(config(), [*words, "--save_strategy=epoch", "--learning_rate", "3e-4"]).args
    assert args.num_rounds == 7
    assert args.merge_kwargs == {"density": 0.5}
    assert args.load_best_model_at_end is True
    assert args.learning_rate == 3e-4
    assert args.per_device_train_batch_size == 8


def test_values_of_every_form():
    args = parse_training(
        {
            "task_weights": {"a": 2.0},
            "task_specific_modules": ["norm"],
            "outer_learning_rate": "norm",
            "weight_decay": "1e-2",
            "local_steps": 3,
            "disable_tqdm": True,
        },
        ["--task_specific_modules", "bias", "norm", "--outer_nesterov", "false"],
    )
    assert args.task_weights == {"a": 2.0}
    assert args.task_specific_modules == ["bias", "norm"]
    assert args.outer_learning_rate == "norm"
    assert args.weight_decay == 0.01
    assert args.outer_nesterov is False


def test_task_defaults(config):
    path = config(task_defaults={"max_train_examples": 5, "max_length": 9})
    content = yaml.safe_load(path.read_text())
    content["tasks"]["tone"]["max_length"] = 3
    path.write_text(yaml.safe_dump(content))
    tasks = read_experiment(path).tasks
    assert (tasks["tone"].max_length, tasks["tone"].max_train_examples) == (3, 5)
    assert tasks["likeness"].max_length == 9


def test_environment_variables_and_home(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    experiment = read_experiment(config(data_root="$MY_DATA", model={"backbone": "~/encoder"}))
    assert experiment.tasks["tone"].dataset == str(tmp_path / "data" / "tone")
    assert experiment.model["backbone"] == str(tmp_path / "encoder")


def test_a_hub_id_stays_one(config):
    tasks = {"sst2": {"dataset": "nyu-mll/glue", "subset": "sst2"}}
    experiment = read_experiment(config(tasks=tasks, model={"backbone": "google-bert/bert-base-uncased"}))
    assert experiment.tasks["sst2"].dataset == "nyu-mll/glue"
    assert experiment.model["backbone"] == "google-bert/bert-base-uncased"


def test_package_references(tmp_path):
    import sklearn

    found = resolve_reference("package:sklearn/datasets/data", tmp_path)
    assert found.startswith(sklearn.__path__[0])
    with pytest.raises(FileNotFoundError, match="'no_such_thing' is not installed; try pip install no-such-thing"):
        resolve_reference("package:no_such_thing/model", tmp_path)
    with pytest.raises(FileNotFoundError, match="the package has no folder 'nowhere'"):
        resolve_reference("package:sklearn/nowhere", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {}}, "config has the unknown key 'trainning'; did you mean 'training'.*known: model, tasks"),
        ({"zzz": 1}, "config has the unknown key 'zzz'; known: compare, continual, data_root"),
        ({"model": {"backbone": "encoder", "polling": "mean"}}, "did you mean 'pooling'"),
        ({"model": {}}, "exactly one of backbone, config and causal_lm, and has 0"),
        ({"model": {"backbone": "a", "causal_lm": "b"}}, "has 2 of them"),
        ({"model": "encoder"}, "model must hold keys and values, not 'encoder'"),
        ({"model": {"backbone": "./nowhere"}}, "model './nowhere' is not a folder"),
        ({"model": {"backbone": "encoder", "image": {"sise": 3}}}, "did you mean 'size'"),
        ({"tasks": {}}, "names no task"),
        ({"tasks": {"a": {"datset": "x"}}}, "tasks.a has the unknown key 'datset'; did you mean 'dataset'"),
        ({"tasks": {"a": {"metrics": "f1"}}}, "tasks.a lacks the key 'dataset'"),
        ({"tasks": ["a"]}, "tasks must hold keys and values"),
        ({"task_defaults": {"metric": "f1"}}, "task_defaults has the unknown key 'metric'; did you mean 'metrics'"),
        ({"training": {"num_round": 3}}, "training has the unknown key 'num_round'; did you mean 'num_rounds'"),
        ({"training": {"num_rounds": "three"}}, "training: argument --num_rounds.*: invalid int value: 'three'"),
        ({"training": {"num_rounds": 0}}, "num_rounds is 0"),
        ({"data_root": "nowhere"}, "data_root 'nowhere' is not a folder"),
    ],
)
def test_bad_files(config, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_experiment(config(**changes))


def test_bad_overrides(config):
    with pytest.raises(ValueError, match="unknown setting '--num_roundz'; did you mean 'num_rounds'"):
        read_experiment(config(), ["--num_roundz", "3"])
    with pytest.raises(ValueError, match="unknown setting 'stray'"):
        read_experiment(config(), ["stray"])
    with pytest.raises(ValueError, match="invalid float value: 'fast'"):
        read_experiment(config(), ["--learning_rate", "fast"])


def test_no_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_experiment(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_experiment(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="config must hold keys and values"):
        read_experiment(tmp_path / "empty.yaml")


def test_peft():
    config = build_peft_config({"r": 4, "lora_alpha": 8, "target_modules": ["query"]}, causal_lm=False)
    assert (config.r, config.task_type) == (4, None)
    assert build_peft_config({"r": 4}, causal_lm=True).task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match="model.peft has the unknown key 'rank'"):
        build_peft_config({"rank": 4}, causal_lm=False)


def test_shipped_configs_are_valid(tmp_path):
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2] / "examples" / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        if file.stem.endswith("_hub"):
            experiment = read_experiment(file)
            assert len(experiment.tasks) > 2
        else:
            content = yaml.safe_load(file.read_text())
            parse_training({**content["training"], "output_dir": str(tmp_path)})
            assert content["data_root"].startswith("../../../shared/data/")
    assert training(tmp_path)["num_rounds"] == 2
