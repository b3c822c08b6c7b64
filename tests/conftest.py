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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, to which everything in this process that asks for the Hub speaks."""
    import huggingface_hub
    import transformers
    from huggingface_hub import constants

    from hf_atm import hub as hub_module

    from .hub_server import OURS, READER, HubServer

    server = HubServer(
        {
            OURS: {"name": "me", "orgs": ["lab"], "write": True},
            READER: {"name": "me", "orgs": ["lab"], "write": False},
        }
    )
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    # The functions of the module are methods of an object that was made on import.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", OURS)
    # Waiting is left out, here and in the client's own repetitions.
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    yield server
    server.close()
