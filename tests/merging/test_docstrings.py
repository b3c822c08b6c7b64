from __future__ import annotations

import inspect
from pkgutil import walk_packages

import pytest

import hf_atm.merging as merging
from hf_atm.merging import registry
from hf_atm.merging.postprocess import registry as postprocess

from ..docstrings import failed_examples


MODULES = sorted(module.name for module in walk_packages(merging.__path__, "hf_atm.merging.") if not module.ispkg)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(postprocess, "_PROCESSORS", dict(postprocess._PROCESSORS))
    assert failed_examples(name) == 0


def test_public_names_are_sorted_and_documented():
    assert merging.__all__ == sorted(merging.__all__)
    for name in merging.__all__:
        text = inspect.getdoc(getattr(merging, name)) or ""
        assert text, name
        if inspect.isfunction(getattr(merging, name)) and not name.startswith("list_"):
            assert "Args:" in text and "Returns:" in text, name
