"""The documentation site: what its pages name exists, what is public is on them, and it builds without a warning."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import hf_atm
from hf_atm import ATMArguments
from hf_atm.merging import get_merge_method, list_merge_methods, register_merge_method, registry

from .pages import DOCS, ROOT


CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
IDENTIFIERS = [
    found for page in sorted(DOCS.rglob("*.md")) for found in re.findall(r"^#* *::: (\S+)$", page.read_text(), re.M)
]
PACKAGES = (
    "",
    ".merging",
    ".alignment",
    ".analysis",
    ".figures",
    ".model_card",
    ".baselines",
    ".continual",
    ".tasks",
    ".latent",
    ".fewshot",
)
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="MkDocs is not installed (extra `docs`)"
)


def load(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(identifier):
    parts = identifier.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(identifier)


def pages_of(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for item in (entry if isinstance(entry, list) else entry.values()) for page in pages_of(item)]


def test_every_page_is_in_the_navigation_once():
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(pages_of(CONFIG["nav"])) == sorted(pages)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_what_a_page_documents_exists(identifier):
    found = resolve(identifier)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert inspect.getdoc(found)
    # Where a module has the same name, the page would show that.
    assert not inspect.ismodule(sys.modules.get(identifier))


def test_nothing_is_documented_twice():
    assert len(IDENTIFIERS) == len(set(map(resolve, IDENTIFIERS)))


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_is_public_is_documented(package):
    module = importlib.import_module(f"hf_atm{package}")
    public = {name: getattr(module, name) for name in module.__all__}
    documented = set(map(resolve, IDENTIFIERS))
    missing = [
        name
        for name, value in public.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value not in documented
    ]
    assert not missing


def test_the_table_of_methods_is_the_register():
    table = load("hooks").merge_method_table()
    rows = {label: row for row in table.splitlines()[2:] for label in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert sorted(rows) == list_merge_methods()
    for name, row in rows.items():
        parameters = re.findall(r"`(\w+)(?:=[^`]*)?`", row.split(" | ")[3])
        assert parameters == list(get_merge_method(name).parameters), name
    assert "`density=0.2`" in rows["ties"] and "[2306.01708](https://huggingface.co/papers/2306.01708)" in rows["ties"]
    assert "`density`" in rows["dare"], "a required parameter has no default"
    assert rows["mean"] == rows["linear"]
    assert "2311.03099" in rows["dare_ties"] and "2306.01708" in rows["dare_ties"]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows.values())


def test_a_new_method_enters_the_table(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @register_merge_method("newest", family="elementwise")
    def newest(task_vectors, weights, names, *, share=0.5):
        """Newest (https://huggingface.co/papers/2401.00001)."""

    page = load("hooks").on_page_markdown("before\n\n<!-- table of merge methods -->\n\nafter")
    assert "| [`newest`][hf_atm.merging.newest] | Newest. | elementwise | `share=0.5` | [2401.00001](" in page
    assert page.startswith("before\n\n|") and page.endswith("|\n\nafter")


DOCSTRING = """Measures something.

Args:
    model ([`Model`]): See [`~other.Trainer`] and [`Model.fit`].
    sizes, names (`list[int]` or `dict[str, int]`, *optional*, defaults to `None`): Two that share
        an entry of two lines.
    device (`str`, `torch.device`, *optional*):
        Where.
    rest (*optional*): Untyped.

Returns:
    `dict[str, int]`: All of it: `a` and
    `b`.

Raises:
    `KeyError`, `ValueError`: When wrong.
    TypeError: Plain.

Cost: none.
"""

GOOGLE = """Measures something.

Args:
    model (Model): See [`~other.Trainer`] and [`Model.fit`].
    sizes (list[int] | dict[str, int]): Two that share
        an entry of two lines.
    names (list[int] | dict[str, int]): Two that share
        an entry of two lines.
    device (str | torch.device):
        Where.
    rest: Untyped.

Returns:
    dict[str, int]: All of it: `a` and
    `b`.

Raises:
    KeyError | ValueError: When wrong.
    TypeError: Plain.

Cost: none.
"""


@needs_mkdocs
def test_docstrings_turn_into_googles_style():
    assert load("docstrings").google(DOCSTRING) == GOOGLE


@needs_mkdocs
def test_references_and_help_of_fields(caplog):
    import griffe

    source = '''
from dataclasses import dataclass, field
from other import Trainer

LIMIT = 7

@dataclass
class Settings:
    """Settings of a [`Trainer`]."""
    rate: float = field(default=0.5, metadata={"help": "How fast, in "
                                                       "metres."})
    bound: int = field(default=7, metadata={"help": f"At most {LIMIT}."})

def run(settings, limit=LIMIT):
    """Runs [`Settings`], as [`~other.Trainer.train`] does, or [`Nothing`].

    Args:
        settings ([`Settings`]): All.
        limit (`int`, *optional*, defaults to 7): How long.
    """
'''
    extensions = griffe.load_extensions(load("docstrings").HuggingFaceDocstrings())
    with griffe.temporary_visited_package("pkg", {"__init__.py": source}, extensions=extensions) as package:
        settings, run = package["Settings"], package["run"]
        assert settings.docstring.value.endswith("\n\nArgs:\n    rate: How fast, in metres.")
        assert (
            '<autoref identifier="other.Trainer" optional><code>Trainer</code></autoref>' in settings.docstring.value
        )
        assert '<autoref identifier="pkg.Settings" optional><code>Settings</code></autoref>' in run.docstring.value
        assert "<code>Trainer.train</code>" in run.docstring.value
        assert str(run.parameters["limit"].default) == "7"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        'pkg.Settings.bound has no metadata["help"] that is plain text',
        "pkg.run refers to Nothing, which does not exist",
    ]


@needs_mkdocs
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    source = str(Path(hf_atm.__file__).parents[1])
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": source}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert not re.search(r"(?im)warning", done.stdout + done.stderr)

    html = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "api").glob("*.html")}
    for field in fields(ATMArguments):
        row = re.search(rf"<code>{field.name}</code>.*?</tr>", html["training.html"], re.DOTALL)
        text = re.sub(r"<[^>]+>|\s|[`\"'&;]|quot|#39|lt|gt", "", row[0])
        assert re.sub(r"\s|[`\"'&;<>]|quot|lt|gt", "", field.metadata["help"])[:40] in text, field.name
    pages = "\n".join(html.values())
    for identifier in IDENTIFIERS:
        assert f'id="{identifier}"' in pages
    assert "doc-module" not in pages, "a module is shown in place of a function of its name"
    assert "[`" not in pages and "*optional*" not in pages and "<autoref" not in pages
    assert "<table>" in html["merge-methods.html"] and "<!-- table" not in html["merge-methods.html"]
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?https?:", page.read_text("utf-8"))
