"""Examples of docstrings, run."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module


def failed_examples(module_name: str) -> int:
    """Number of examples that fail in the docstrings of a module's own functions and classes."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for label, item in vars(import_module(module_name)).items():
        if (inspect.isfunction(item) or inspect.isclass(item)) and item.__module__ == module_name:
            # The fences of the documentation builder are not output.
            text = (inspect.getdoc(item) or "").replace("```python", "").replace("```", "")
            runner.run(parser.get_doctest(text, {}, label, None, None))
    return runner.summarize(verbose=False).failed
