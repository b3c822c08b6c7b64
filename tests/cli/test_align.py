"""`hf-atm align` on saved models: functions survive, what was planted is found, inputs stay as they were."""

from __future__ import annotations

import json

import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTModel

from hf_atm.alignment import Alignment, Permutation, spec_for
from hf_atm.cli.main import main


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def models(tmp_path, count=3):
    """One network in several orders, with a little noise."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=16, **SIZES)).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for seed in range(count):
        moved = Permutation.random(spec_for(model), seed).apply(state)
        model.load_state_dict(
            {
                name: v + 0.1 * v.std(correction=0) * torch.randn(v.shape) if v.is_floating_point() else v
                for name, v in moved.items()
            }
        )
        model.save_pretrained(tmp_path / f"seed-{seed}")
        (tmp_path / f"seed-{seed}" / "vocab.txt").write_text("words")
        found.append(str(tmp_path / f"seed-{seed}"))
    return found


def logits(folder):
    torch.manual_seed(1)
    ids = torch.randint(0, 30, (4, 7))
    with torch.no_grad():
        return BertForSequenceClassification.from_pretrained(folder).eval()(input_ids=ids).logits


def test_aligned_models_compute_the_same_and_can_be_averaged(tmp_path, capsys):
    folders = models(tmp_path)
    before = [(tmp_path / f"seed-{seed}" / "model.safetensors").read_bytes() for seed in range(3)]
    out = tmp_path / "aligned"
    assert main(["align", *folders, "--out", str(out)]) == 0
    assert "aligned/seed-1:" in capsys.readouterr().out
    for seed, folder in enumerate(folders):
        assert torch.allclose(logits(out / f"seed-{seed}"), logits(folder), atol=1e-5)
        assert (tmp_path / f"seed-{seed}" / "model.safetensors").read_bytes() == before[seed]
        assert (out / f"seed-{seed}" / "vocab.txt").read_text() == "words"
    recipe = {"merge_method": "mean", "models": [{"model": str(out / f"seed-{seed}")} for seed in range(3)]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "recipe.json"), str(tmp_path / "merged"), "--quiet"]) == 0
    recipe["models"] = [{"model": folder} for folder in folders]
    (tmp_path / "naive.json").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "naive.json"), str(tmp_path / "naive"), "--quiet"]) == 0
    # Aligned, the mean is nearer to the models than they are to each other; unaligned it is none of them.
    first = logits(folders[0])
    assert (logits(tmp_path / "merged") - first).norm() < 0.5 * (logits(tmp_path / "naive") - first).norm()
    maps = Alignment.load(out / "alignment.safetensors")
    assert maps.map(1, 2).compose(maps.map(0, 1)).compose(maps.map(2, 0)).is_identity
    facts = json.loads((out / "alignment.json").read_text())
    assert facts["models"]["seed-0"] == folders[0] and facts["method"] == "c2m3"


def test_bad_input(tmp_path, capsys):
    folders = models(tmp_path, 2)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)).save_pretrained(tmp_path / "vit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "taken.incomplete").mkdir()
    (tmp_path / "taken.incomplete" / "precious").touch()
    out = str(tmp_path / "out")
    capsys.readouterr()
    for arguments, message in (
        ([folders[0], "--out", out], "needs at least two"),
        ([folders[0], str(tmp_path / "vit"), "--out", out], "different types (bert, vit)"),
        ([*folders, "--out", str(tmp_path / "full")], "holds something already; name another folder"),
        ([*folders, "--out", out, "--names", "a", "a"], "as many different folder names"),
        ([folders[0], str(tmp_path / "none"), "--out", out], "neither a folder nor a Hub id"),
        ([folders[0], str(adapter), "--out", out], "is an adapter; merge it into its base model first"),
        ([*folders, "--out", out, "--names", "alignment.json", "b"], "as many different folder names"),
        ([*folders, "--out", str(tmp_path / "full" / "note" / "deep")], "lies below a file; name another folder"),
        ([*folders, "--out", str(tmp_path / "taken")], "is in the way, where the output is made"),
        ([*folders, "--out", out, "--device", "nonsense"], "device='nonsense' cannot be used here"),
        ([*folders, "--out", out, "--heads", "nothing.*"], "heads names 'nothing.*', which matches no tensor"),
    ):
        assert main(["align", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "taken.incomplete" / "precious").is_file()
