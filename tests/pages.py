"""The pages a user reads, and what stands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# These have commands as well, and no code to run.
COMMAND_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str, pages: list[Path] = PAGES) -> list:
    """The fenced blocks of a language, as parameters of a test."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block, id=f"{name_of(page)}-{index}")
        for page in pages
        for index, block in enumerate(fence.findall(page.read_text(encoding="utf-8")))
    ]


def commands(program: str) -> list:
    """Lines of indented blocks that call a program, as parameters of a test."""
    return [
        pytest.param(line, id=f"{name_of(page)}: {line}") for page in COMMAND_PAGES for line in _lines(page, program)
    ]


def _lines(page: Path, program: str) -> Iterator[str]:
    for found in re.finditer(rf"^    ({re.escape(program)} .*)$", re.sub(r"\\\n\s*", "", prose(page)), re.MULTILINE):
        yield found[1]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: Path) -> list[str]:
    """What stands in backticks within the text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
