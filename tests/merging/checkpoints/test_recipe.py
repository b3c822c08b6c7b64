from __future__ import annotations

import pytest

from hf_atm.merging.checkpoints.recipe import MergeRecipe, RecipeModel, read_recipe


MODELS = [{"model": "./a", "parameters": {"weight": 0.5}}, {"model": "org/b"}]


def test_the_contract(tmp_path):
    text = """
    merge_method: ties
    base_model: google-bert/bert-base-uncased
    models:
      - {model: ./sst2, parameters: {weight: 0.5}}
      - {model: ./cola, parameters: {weight: 0.5}}
    parameters: {density: 0.2, scaling_coefficient: 1.0}
    dtype: float32
    out_dtype: bfloat16
    """
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.merge_method == "ties" and recipe.base_model == "google-bert/bert-base-uncased"
    assert [(model.name, model.weight) for model in recipe.models] == [("./sst2", 0.5), ("./cola", 0.5)]
    assert recipe.parameters == {"density": 0.2, "scaling_coefficient": 1.0} and recipe.out_dtype == "bfloat16"
    assert read_recipe(recipe) == recipe
    assert read_recipe(tmp_path / "recipe.yaml").digest == recipe.digest


B = {"model": "b", "parameters": {"density": 0.3}}


def test_what_other_tools_call_otherwise():
    recipe = read_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "dtype": "bfloat16",
            "models": [{"model": "base"}, {"model": "a", "parameters": {"weight": 1, "density": 0.3}}, B],
            "parameters": {"normalize": False, "int8_mask": True, "lambda": 0.7},
        }
    )
    assert [model.model for model in recipe.models] == ["a", "b"]
    assert recipe.parameters == {"merge_func": "sum", "density": 0.3, "scaling_coefficient": 0.7}
    assert recipe.out_dtype == "bfloat16"
    slerp = read_recipe({"merge_method": "slerp", "base_model": "b", "models": ["a", "b"], "parameters": {"t": 0.2}})
    assert [model.model for model in slerp.models] == ["b", "a"] and slerp.base_model is None


def test_folders_are_looked_up_beside_the_recipe_and_named_by_their_last_part(tmp_path):
    for name in ("x/sst2", "x/cola"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipe.json").write_text('{"models": ["x/sst2", {"model": "x/cola", "name": "grammar"}]}')
    recipe = read_recipe(tmp_path / "recipe.json")
    assert [model.model for model in recipe.models] == [str(tmp_path / "x/sst2"), str(tmp_path / "x/cola")]
    assert [model.name for model in recipe.models] == ["sst2", "grammar"]


TIES = {"merge_method": "ties", "base_model": "base"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"merge_methd": "ties"}, ValueError, ["unknown key 'merge_methd'", "did you mean 'merge_method'"]),
        ({"slices": []}, ValueError, ["'slices' is not supported", "models"]),
        ({"merge_method": "tise"}, KeyError, ["'tise'", "ties"]),
        ({"models": None}, ValueError, ["'models' must be a list"]),
        ({"models": []}, ValueError, ["'models' must be a list"]),
        ({"models": "a"}, ValueError, ["'models' must be a list"]),
        ({"models": [{"modl": "a"}]}, ValueError, ["needs a model"]),
        ({"models": [{"model": "a", "wieght": 1}]}, ValueError, ["'a' has an unknown key 'wieght'"]),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, ValueError, ["'wieght'", "did you mean 'weight'"]),
        ({"models": [{"model": "a", "parameters": {"weight": [0, 1]}}]}, ValueError, ["weight=[0, 1]", "one finite"]),
        ({"models": [{"model": "a", "parameters": {"weight": float("nan")}}]}, ValueError, ["weight=nan"]),
        ({"models": ["a", "a"]}, ValueError, ["'a' occurs more than once"]),
        ({"parameters": {"density": 2}, "merge_method": "ties", "base_model": "b"}, ValueError, ["density=2"]),
        (
            {"parameters": {"densty": 0.2}, "merge_method": "ties", "base_model": "b"},
            ValueError,
            ["'densty'", "did you"],
        ),
        ({"parameters": [1]}, ValueError, ["'parameters' must be a mapping"]),
        ({"dtype": "int8"}, ValueError, ["dtype='int8'", "bfloat16"]),
        ({"out_dtype": "half"}, ValueError, ["out_dtype='half'"]),
        ({"exclude": "lm_head"}, ValueError, ["'exclude' must be a list", "['lm_head']"]),
        ({"strict": "no"}, ValueError, ["'strict' must be true or false"]),
        ({"buffers": "mean"}, ValueError, ["buffers='mean'", "pooled"]),
        ({"vocab_policy": "union"}, ValueError, ["vocab_policy='union'", "common"]),
        ({"tokenizer_source": "union"}, ValueError, ["tokenizer_source='union'", "base"]),
        (
            {
                "models": [
                    {"model": "a", "parameters": {"density": 0.1}},
                    {"model": "b", "parameters": {"density": 0.2}},
                ]
            },
            ValueError,
            ["different densities [0.1, 0.2]"],
        ),
        (
            {"models": [{"model": "a", "parameters": {"density": 0.1}}, "b"]},
            ValueError,
            ["density 0.1", "others none"],
        ),
        (
            {"models": ["a", B, B | {"name": "c"}][1:], **TIES, "parameters": {"density": 0.1}},
            ValueError,
            ["density=0.1"],
        ),
        ({**TIES, "parameters": {"lambda": 1, "scaling_coefficient": 2}}, ValueError, ["'lambda'", "one of them"]),
        (
            {**TIES, "parameters": {"normalize": True, "merge_func": "sum"}},
            ValueError,
            ["'normalize'", "'merge_func'"],
        ),
        ({"models": [{"model": "a", "parameters": [1]}]}, ValueError, ["'a'", "parameters=[1]"]),
        ({"merge_method": ["ties"]}, ValueError, ["'merge_method' must be a text"]),
        ({"base_model": 3}, ValueError, ["'base_model' must be a text"]),
        ({"exclude": [3]}, ValueError, ["'exclude'", "3 is none"]),
        ({"adapters": "svd"}, ValueError, ["'adapters' must be a mapping"]),
        ({"merge_method": "regmean"}, ValueError, ["regmean", "statistics", "'./a'"]),
    ],
)
def test_wrong_recipes(change, error, words):
    with pytest.raises(error) as caught:
        read_recipe({"models": MODELS, **change})
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml' does not exist"):
        read_recipe("nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("models: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="must be a mapping"):
        read_recipe(tmp_path / "list.yaml")


def test_the_base_is_known_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("base")
    for alias in ("./base", "base/", str(tmp_path / "base"), "link"):
        recipe = read_recipe({"merge_method": "ties", "base_model": "base", "models": [alias, "a"]})
        assert [model.model for model in recipe.models] == ["a"]
        slerp = read_recipe({"merge_method": "slerp", "base_model": "base", "models": ["a", alias]})
        assert [model.model for model in slerp.models] == [alias, "a"]


def test_recipes_made_in_python_are_checked_too():
    models = [RecipeModel("a", "a"), RecipeModel("b", "b")]
    assert read_recipe(MergeRecipe(models)).merge_method == "mean"
    for wrong in ({"parameters": {"density": 5}}, {"parameters": {"densty": 0.2}}, {"models": [models[0], models[0]]}):
        with pytest.raises(ValueError):
            read_recipe(MergeRecipe(**{"models": models, "merge_method": "ties", "base_model": "base", **wrong}))
