"""What MkDocs takes from the code while it builds: the table of merge methods."""

from __future__ import annotations

import inspect
import re
from typing import Any


MARKER = "<!-- table of merge methods -->"
_PAPER = re.compile(r" ?\(https://huggingface\.co/papers/([\d.]+)\)")
_REFERENCE = re.compile(r"\[`(\w+)`\]")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Puts the table in the place of its marker."""
    return markdown.replace(MARKER, merge_method_table()) if MARKER in markdown else markdown


def merge_method_table() -> str:
    """Names, families, parameters and papers of all registered merge methods, as Markdown."""
    from hf_atm.merging import get_merge_method, list_merge_methods

    names: dict[Any, list[str]] = {}
    for name in list_merge_methods():
        names.setdefault(get_merge_method(name).function, []).append(name)
    rows = []
    # The function has the first of its names; the others are aliases.
    for function, labels in sorted(names.items(), key=lambda item: item[0].__name__):
        labels.sort(key=lambda label: label != function.__name__)
        method, summary = get_merge_method(labels[0]), _summary(function)
        shown = [f"[`{labels[0]}`][hf_atm.merging.{function.__name__}]", *(f"`{label}`" for label in labels[1:])]
        parameters = [f"`{_parameter(name, default)}`" for name, default in method.parameters.items()]
        text = _REFERENCE.sub(r"[`\1`][hf_atm.merging.\1]", _PAPER.sub("", summary))
        rows.append([", ".join(shown), text, method.family, " ".join(parameters), _papers(summary)])
    header = ["method", "", "family", "parameters", "paper"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def _summary(function: Any) -> str:
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def _papers(summary: str) -> str:
    """Links to the papers a summary names, or else to those of the methods it builds on."""
    from hf_atm.merging import get_merge_method

    found = _PAPER.findall(summary)
    for name in () if found else _REFERENCE.findall(summary):
        found += _PAPER.findall(_summary(get_merge_method(name).function))
    return ", ".join(f"[{paper}](https://huggingface.co/papers/{paper})" for paper in found)


def _parameter(name: str, default: Any) -> str:
    """A parameter with its default, unless that is long; one without a default is required."""
    if default is inspect.Parameter.empty:
        return name
    return f"{name}={default!r}" if len(repr(default)) <= 12 else f"{name}=..."
