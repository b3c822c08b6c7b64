"""The oracle is CLIPModel's own `logits_per_image`, on a tiny random CLIP and a word-level tokenizer built here."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from modeling_families import shake
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hf_atm import MultiTaskModel


LABELS = {"pets": ["cat", "dog", "red bird"], "things": ["car", "house"]}


@pytest.fixture(scope="module")
def tokenizer():
    words = "a photo of the cat dog red bird car house drawing .".split()
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_clip():
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**shared, "vocab_size": 20, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = tf.CLIPConfig(
        text_config={**text, "max_position_embeddings": 16},
        vision_config={**shared, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shake(tf.CLIPModel(config)).eval()


def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def oracle(clip, tokenizer, prompts):
    return clip(**tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=images()).logits_per_image


def specs(**extra):
    return {task: {"labels": labels, **extra} for task, labels in LABELS.items()}


def test_logits_equal_clips(tokenizer):
    clip = make_clip()
    model = MultiTaskModel.from_clip(copy.deepcopy(clip), specs(templates=["a photo of a {}."]), tokenizer=tokenizer)
    for task, labels in LABELS.items():
        expected = oracle(clip, tokenizer, [f"a photo of a {label}." for label in labels])
        assert expected.std(0).min() > 1e-3
        with torch.no_grad():
            logits = model(pixel_values=images(), task=task).logits
        # fp32 rounding of cosines times a scale of about 14
        assert (logits - expected).abs().max() <= 1e-5
    assert model.config.tasks["pets"]["id2label"] == {0: "cat", 1: "dog", 2: "red bird"}


def test_templates_are_averaged(tokenizer):
    clip = make_clip()
    templates = ["a photo of a {}.", "a drawing of the {}"]
    model = MultiTaskModel.from_clip(copy.deepcopy(clip), specs(templates=templates), tokenizer=tokenizer)
    rows = []
    with torch.no_grad():
        for label in LABELS["pets"]:
            units = []
            for template in templates:
                batch = tokenizer([template.replace("{}", label)], return_tensors="pt")
                units.append(torch.nn.functional.normalize(clip.get_text_features(**batch).pooler_output[0], dim=0))
            rows.append(torch.nn.functional.normalize(sum(units) / 2, dim=0))
        image = torch.nn.functional.normalize(clip.get_image_features(images()).pooler_output, dim=-1)
        expected = clip.logit_scale.exp() * image @ torch.stack(rows).T
        assert (model(pixel_values=images(), task="pets").logits - expected).abs().max() <= 1e-5


def test_heads_are_frozen_and_the_image_tower_trains(tokenizer, tmp_path):
    model = MultiTaskModel.from_clip(make_clip(), specs(), tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    for found in (model, loaded):
        assert all(not p.requires_grad for p in found.heads.parameters())
        found(pixel_values=images(), labels=torch.tensor([0, 1, 2, 0, 1]), task="pets").loss.backward()
        assert all(
            p.grad is not None and p.grad.abs().max() > 0 for p in found.backbone.visual_projection.parameters()
        )
        assert all(p.grad is not None for p in found.backbone.parameters())
        assert all(p.grad is None for p in found.heads.parameters())


def test_from_a_folder(tokenizer, tmp_path):
    clip = make_clip()
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = MultiTaskModel.from_clip(tmp_path, specs())
    expected = oracle(clip, tokenizer, [f"a photo of a {label}." for label in LABELS["things"]])
    with torch.no_grad():
        assert (model(pixel_values=images(), task="things").logits - expected).abs().max() <= 1e-5
    assert model.config.base_model_name_or_path == str(tmp_path)


def test_export_to_clip(tokenizer, tmp_path):
    clip = make_clip()
    model = MultiTaskModel.from_clip(copy.deepcopy(clip), specs(), tokenizer=tokenizer)
    shake(model.backbone)
    with pytest.raises(ValueError, match="to_clip_model"):
        model.to_task_model("pets")
    model.to_clip_model(clip).save_pretrained(tmp_path)
    exported = tf.CLIPModel.from_pretrained(tmp_path)
    expected = oracle(exported, tokenizer, [f"a photo of a {label}." for label in LABELS["pets"]])
    with torch.no_grad():
        assert (model(pixel_values=images(), task="pets").logits - expected).abs().max() <= 1e-5


def test_trained_heads_beside_zero_shot_ones(tokenizer, tmp_path):
    model = MultiTaskModel.from_clip(make_clip(), specs(), tokenizer=tokenizer)
    model.add_task("colour", {"num_labels": 4})
    shake(model.heads["colour"])
    export = model.to_task_model("colour")
    assert type(export) is tf.CLIPForImageClassification
    with torch.no_grad():
        expected = model(pixel_values=images(), task="colour").logits
        assert (export(pixel_values=images()).logits - expected).abs().max() <= 1e-6
    model.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(pixel_values=images(), task="colour").logits - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("source", ["module", "folder"])
def test_from_backbone_takes_the_image_tower(source, tmp_path):
    clip = make_clip()
    tower = copy.deepcopy(clip.vision_model.state_dict())
    if source == "folder":
        clip.save_pretrained(tmp_path)
        clip = tmp_path
    model = MultiTaskModel.from_backbone(clip, {"colour": {"num_labels": 4}})
    state = model.backbone.state_dict()
    assert set(state) == set(tower) and all(torch.equal(state[name], tower[name]) for name in tower)
    assert type(model.to_task_model("colour")) is tf.CLIPForImageClassification


def test_bad_input(tokenizer):
    clip = make_clip()
    with pytest.raises(ValueError, match="'pets' needs \"labels\""):
        MultiTaskModel.from_clip(clip, {"pets": {"num_labels": 2}}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="'pets'.*for the label"):
        MultiTaskModel.from_clip(clip, {"pets": {"labels": ["a"], "templates": ["a photo"]}}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="needs tokenizer="):
        MultiTaskModel.from_clip(clip, specs())
    with pytest.raises(ValueError, match="from_clip"):
        MultiTaskModel.from_clip(clip, specs(), tokenizer=tokenizer).add_task(
            "x", {"labels": ["a"], "head": "zero_shot"}
        )
    with pytest.raises(ValueError, match="not a CLIPVisionModel"):
        MultiTaskModel.from_clip(clip.vision_model, specs(), tokenizer=tokenizer)
    bert = MultiTaskModel.from_backbone(clip.vision_model, {"a": {"num_labels": 2}})
    with pytest.raises(ValueError, match="use to_task_model"):
        bert.to_clip_model(clip)
