from __future__ import annotations

import os


# Before transformers is imported anywhere: nothing in the suite may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _clean_state():
    """Same threads, same random numbers, and warnings that are given once are given again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.warning_once.cache_clear()
    yield
