"""Examples in docstrings run, and every public name has a docstring."""

from __future__ import annotations

import inspect
from pkgutil import walk_packages

import pytest

import hf_atm.alignment as alignment

from ..docstrings import failed_examples


@pytest.mark.parametrize(
    "name", sorted(module.name for module in walk_packages(alignment.__path__, "hf_atm.alignment."))
)
def test_examples_run(name):
    assert failed_examples(name) == 0


def test_public_names_are_sorted_and_documented():
    assert alignment.__all__ == sorted(alignment.__all__)
    for name in alignment.__all__:
        item = getattr(alignment, name)
        text = inspect.getdoc(item) or ""
        assert "Args:" in text if inspect.isfunction(item) else text, name
