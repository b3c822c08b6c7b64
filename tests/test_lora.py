"""LoRA in the loop: merged updates are those of the weights, exactly, and what cannot be exact is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_atm import ATMCallback
from hf_atm.lora import LoraSpace, compress
from tests.testing_utils import TASKS, TinyModel, largest_difference, make_datasets, make_trainer, parameters_of


CONFIGS = {
    "plain": {"r": 3, "lora_alpha": 6},
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 2, "rank_pattern": {"body.0": 5}, "alpha_pattern": {"body.2": 7}},
    "nonzero start": {"r": 2, "init_lora_weights": False},
}


class Watch(ATMCallback):
    """Keeps every expert as a whole plain model, its adapter folded in by PEFT itself."""

    def __init__(self):
        self.experts, self.bases = {}, []

    def on_round_begin(self, args, state, control, *, model, **kwargs):
        self.bases.append(folded(model))
        self.experts = {}

    def on_task_end(self, args, state, control, *, task, model, **kwargs):
        self.experts[task] = folded(model)


def folded(model):
    return parameters_of(copy.deepcopy(model).merge_and_unload())


def body(state):
    return {name: value for name, value in state.items() if name.startswith("body.")}


def lora_trainer(folder, model=None, callbacks=(), config=None, **changes):
    config = {"r": 3, "target_modules": ["body.0", "body.2"], **(config or {})}
    return make_trainer(folder, model, peft_config=LoraConfig(**config), callbacks=list(callbacks), **changes)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_merged_update_is_the_mean_of_the_true_updates(tmp_path, case):
    torch.manual_seed(0)
    watch = Watch()
    trainer = lora_trainer(tmp_path, callbacks=[watch], config=CONFIGS[case], num_rounds=2, learning_rate=0.5)
    trainer.train()
    merged = body(folded(trainer.model))
    for name in merged:
        mean = torch.stack([watch.experts[task][name].double() for task in TASKS]).mean(0)
        if name.endswith("weight"):
            assert (mean - watch.bases[-1][name]).abs().max() > 1e-3, "nothing was trained"
        assert (merged[name] - mean).abs().max() <= 1e-5


def test_ties_sees_the_true_updates(tmp_path):
    from tests.reference import atm_loop

    watch = Watch()
    kwargs = {"density": 0.3, "min_sparse_numel": 0}
    trainer = lora_trainer(
        tmp_path, callbacks=[watch], num_rounds=1, merge_method="ties", merge_kwargs=kwargs, learning_rate=0.5
    )
    trainer.train()
    names = sorted(name for name in body(watch.bases[0]) if name.endswith("weight"))
    flat = [
        torch.cat([(watch.experts[task][name] - watch.bases[0][name]).double().reshape(-1) for name in names])
        for task in sorted(TASKS)
    ]
    expected = atm_loop.ties(flat, 0.3)
    merged = folded(trainer.model)
    found = torch.cat([(merged[name] - watch.bases[0][name]).double().reshape(-1) for name in names])
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-5


def test_svd_mode_is_the_best_approximation_of_its_rank(tmp_path):
    watch = Watch()
    trainer = lora_trainer(
        tmp_path, callbacks=[watch], num_rounds=1, lora_merge_mode="svd", learning_rate=0.5, config={"r": 2}
    )
    base = parameters_of(trainer.model.get_base_model())
    trainer.train()
    merged = folded(trainer.model)
    for layer in ("body.0", "body.2"):
        name = f"{layer}.weight"
        start = base[f"{layer}.base_layer.weight"].double()
        mean = torch.stack([watch.experts[task][name].double() - start for task in TASKS]).mean(0)
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        assert s[2] > 1e-5, "the mean fits the rank by itself"
        assert (merged[name] - start - best).abs().max() <= 1e-5
        assert torch.equal(parameters_of(trainer.model.get_base_model())[f"{layer}.base_layer.weight"].double(), start)


def test_compress_keeps_a_trainable_direction_where_there_is_no_update():
    previous = torch.randn(3, 8)
    a, b = compress(torch.zeros(5, 8), previous)
    assert torch.count_nonzero(b) == 0
    assert torch.linalg.matrix_rank(a) == 3
    assert float((a * previous).sum()) > 0, "not turned towards the previous factors"


def test_adapter_mode_averages_the_factors(tmp_path):
    factors = {}

    class Factors(ATMCallback):
        def on_task_end(self, args, state, control, *, task, model, **kwargs):
            factors[task] = {name: value.clone() for name, value in model.state_dict().items() if ".lora_" in name}

    trainer = lora_trainer(tmp_path, callbacks=[Factors()], num_rounds=1, lora_merge_mode="adapter", learning_rate=0.5)
    trainer.train()
    state = trainer.model.state_dict()
    for name in factors["size"]:
        mean = torch.stack([factors[task][name].double() for task in TASKS]).mean(0)
        assert (state[name] - mean).abs().max() <= 1e-6


def test_heads_train_beside_the_adapter_and_stay_private(tmp_path):
    trainer = lora_trainer(tmp_path, num_rounds=1)
    before = parameters_of(trainer.model)
    trainer.train()
    after = parameters_of(trainer.model)
    for task in TASKS:
        name = f"base_model.model.heads.{task}.modules_to_save.default.weight"
        assert not torch.equal(before[name], after[name])
    assert not any("heads" in name for name in trainer.atm.rounds.space.shapes)


@pytest.mark.parametrize(
    ("method", "rounds", "changes"),
    [("mean", 2, {}), ("mean", 1, {"outer_learning_rate": 1.7}), ("ties", 1, {"merge_kwargs": {"density": 0.9}})],
)
def test_saved_experts_apply_to_the_saved_merged_model(tmp_path, method, rounds, changes):
    watch = Watch()
    trainer = lora_trainer(
        tmp_path, callbacks=[watch], num_rounds=rounds, merge_method=method, learning_rate=0.5, **changes
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "saved" / "model.safetensors")
    plain = TinyModel()
    plain.load_state_dict(merged)
    assert largest_difference(body(parameters_of(plain)), body(folded(trainer.model))) <= 1e-6
    for task in TASKS:
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "saved" / "adapters" / task))
        expert = body(parameters_of(loaded.merge_and_unload()))
        assert largest_difference(expert, body(watch.experts[task])) <= 2e-5


def test_saved_experts_bring_their_own_values_of_other_shared_modules(tmp_path):
    watch = Watch()
    config = {"target_modules": ["body.0"], "modules_to_save": ["body.2"]}
    trainer = lora_trainer(tmp_path, callbacks=[watch], num_rounds=1, learning_rate=0.5, config=config)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    from safetensors.torch import load_file

    plain = TinyModel()
    plain.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    for task in TASKS:
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "saved" / "adapters" / task))
        expert = body(parameters_of(loaded.merge_and_unload()))
        assert largest_difference(expert, body(watch.experts[task])) <= 1e-5


def test_saved_experts_of_svd_mode_apply_to_the_pretrained_model(tmp_path):
    watch = Watch()
    base = TinyModel()
    trainer = lora_trainer(
        tmp_path, copy.deepcopy(base), callbacks=[watch], num_rounds=2, lora_merge_mode="svd", learning_rate=0.5
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for task in TASKS:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "saved" / "adapters" / task))
        expert = body(parameters_of(loaded.merge_and_unload()))
        assert largest_difference(expert, body(watch.experts[task])) <= 1e-6
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias")],
)
def test_inexact_options_are_refused_by_name(tmp_path, config, reason):
    with pytest.raises(ValueError, match=rf"cannot be exact with .*{reason}.*lora_merge_mode='adapter'"):
        lora_trainer(tmp_path, config=config)
    trainer = lora_trainer(tmp_path, config=config, lora_merge_mode="adapter", num_rounds=1)
    trainer.train()
    assert trainer.report[0]["merged_norm"] > 0


def test_half_precision_base_weights_are_refused(tmp_path):
    model = TinyModel()
    model.body[0].to(torch.bfloat16)
    with pytest.raises(ValueError, match="body.0.*torch.bfloat16.*dtype=torch.float32"):
        lora_trainer(tmp_path, model)


def test_tied_base_weights_are_refused():
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(target_modules=["wte"], r=2))
    shared = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with pytest.raises(ValueError, match="tied"):
        LoraSpace(model, shared, "delta")
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    shared = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert [tuple(shape) for shape in LoraSpace(model, shared, "delta").shapes.values()] == [(8, 24)]


def test_other_adapters_are_refused(tmp_path):
    from peft import IA3Config

    config = IA3Config(target_modules=["body.0"], feedforward_modules=["body.0"])
    with pytest.raises(ValueError, match="IA3.*no exact low-rank update"):
        make_trainer(tmp_path, TinyModel(), peft_config=config, train_dataset=make_datasets())


def test_a_conv1d_layer_of_gpt2_merges_exactly():
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    for mode in ("delta", "svd"):
        torch.manual_seed(0)
        model = get_peft_model(
            GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
        )
        shared = {name: value for name, value in model.named_parameters() if value.requires_grad}
        space = LoraSpace(model, shared, mode)
        base = space.snapshot()
        start = folded(model)
        with torch.no_grad():
            for parameter in shared.values():
                parameter.add_(torch.randn_like(parameter))
        expert = folded(model)
        vector = space.capture(base)
        space.restore(base)
        space.advance(base, {name: vector[name] for name in vector})
        assert largest_difference(folded(model), expert) <= 1e-5
        assert largest_difference(folded(model), start) > 0.1


def test_the_merged_model_of_delta_mode_loads_in_plain_transformers(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=2
    )
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    import datasets

    data = {
        name: datasets.Dataset.from_dict(
            {"input_ids": torch.randint(1, 32, (16, 5)).tolist(), "labels": [i % 2 for i in range(16)]}
        )
        for name in ("one", "two")
    }
    trainer = make_trainer(
        tmp_path / "run",
        model,
        train_dataset=data,
        num_rounds=1,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    ids = torch.randint(1, 32, (3, 5))
    trainer.model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_a_module_without_adapter_layers_is_refused():
    class Empty(nn.Module):
        pass

    with pytest.raises(ValueError, match="exactly one active adapter"):
        LoraSpace(Empty(), {}, "delta")
