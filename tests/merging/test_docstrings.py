from __future__ import annotations

import doctest
import inspect
from importlib import import_module
from pkgutil import walk_packages

import pytest

import hf_atm.merging as merging
from hf_atm.merging import registry
from hf_atm.merging.postprocess import registry as postprocess


MODULES = sorted(module.name for module in walk_packages(merging.__path__, "hf_atm.merging.") if not module.ispkg)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(postprocess, "_PROCESSORS", dict(postprocess._PROCESSORS))
    module = import_module(name)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for label, item in vars(module).items():
        if inspect.isfunction(item) and item.__module__ == module.__name__:
            # The fences of the documentation builder are not output.
            text = (inspect.getdoc(item) or "").replace("```python", "").replace("```", "")
            runner.run(parser.get_doctest(text, {}, label, None, None))
    assert runner.summarize(verbose=False).failed == 0


def test_public_names_are_sorted_and_documented():
    assert merging.__all__ == sorted(merging.__all__)
    for name in merging.__all__:
        text = inspect.getdoc(getattr(merging, name)) or ""
        assert text, name
        if inspect.isfunction(getattr(merging, name)) and not name.startswith("list_"):
            assert "Args:" in text and "Returns:" in text, name
