"""Specifications of model families; importing this package makes them known."""

from __future__ import annotations

from ..registry import register_permutation_spec
from .bert import bert_spec, distilbert_spec
from .gpt2 import gpt2_spec
from .llama import llama_spec
from .multi_task import multi_task_spec
from .resnet import hf_resnet_spec
from .vit import clip_vision_spec, vit_spec


for _model_type in ("bert", "roberta", "xlm-roberta", "camembert"):
    register_permutation_spec(_model_type, bert_spec)
for _model_type in ("llama", "mistral", "qwen2", "qwen3"):
    register_permutation_spec(_model_type, llama_spec)
for _model_type in ("vit", "deit"):
    register_permutation_spec(_model_type, vit_spec)
register_permutation_spec("clip_vision_model", clip_vision_spec)
register_permutation_spec("distilbert", distilbert_spec)
register_permutation_spec("gpt2", gpt2_spec)
register_permutation_spec("resnet", hf_resnet_spec)
register_permutation_spec("atm_multi_task", multi_task_spec)
