from __future__ import annotations

import doctest
import inspect

import pytest
import torch

from hf_atm import fewshot


@pytest.mark.parametrize("name", fewshot.__all__)
def test_public_names_are_documented_and_their_examples_run(name):
    item = getattr(fewshot, name)
    text = inspect.getdoc(item) or ""
    assert text
    if inspect.isfunction(item):
        assert "Args:" in text
    runner = doctest.DocTestRunner()
    globs = {"torch": torch, name: item}
    runner.run(
        doctest.DocTestParser().get_doctest(text.replace("```python", "").replace("```", ""), globs, name, None, None)
    )
    assert runner.summarize(verbose=False).failed == 0


def test_public_names_are_sorted():
    assert fewshot.__all__ == sorted(fewshot.__all__)
