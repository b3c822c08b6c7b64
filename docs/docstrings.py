"""Hugging Face docstrings for Griffe, whose Google parser nearly reads them.

What differs is rewritten before the parser sees it: types in backticks, names that share one entry, cross references in
brackets. Settings whose help is in `metadata["help"]` get their entries from there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import griffe


logger = griffe.get_logger(__name__)

_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)
# An entry that begins with names, with all of its lines; the type that another one begins with.
_NAMED = re.compile(r"^    ([\w*]+(?:, [\w*]+)*)(?: \((.+?)\))?:((?: .*)?$(?:\n(?: {8}.*)?$)*)", re.MULTILINE)
_TYPED = re.compile(r"^    (?! )([^:\n]*`\]?):", re.MULTILINE)
_OPTIONAL = re.compile(r",? ?\*optional\*.*")
_DEFAULT = re.compile(r"^    (\w+) \(.*\*optional\*, defaults to `?([^`)]+)`?\):", re.MULTILINE)
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def __init__(self) -> None:
        self.help: dict[str, list[str]] = {}

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = getattr(node, "value", None)
        for keyword in value.keywords if isinstance(value, ast.Call) else ():
            if keyword.arg == "metadata":
                try:
                    entry = f"    {attr.name}: {ast.literal_eval(keyword.value)['help']}"
                except (ValueError, KeyError):
                    logger.warning('%s has no metadata["help"] that is plain text', attr.path)
                else:
                    self.help.setdefault(attr.parent.path, []).append(entry)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        objects = list(_objects(pkg))
        paths = {obj.name: obj.path for obj in objects if obj.is_class or obj.is_function and obj.parent.is_module}
        for obj in objects:
            if obj.docstring is None:
                continue
            text = obj.docstring.value
            if obj.path in self.help:
                text = "\n".join([text, "", "Args:", *self.help[obj.path]])
            for name, default in _DEFAULT.findall(text) if obj.is_function else ():
                if name in obj.parameters and str(obj.parameters[name].default).isupper():
                    obj.parameters[name].default = default  # the value of a constant, not its name
            if obj.is_class and not obj.decorators and "__init__" not in obj.members:
                # Its base class makes arguments of its attributes, as configurations of transformers do.
                text = text.replace("\nArgs:\n", "\nAttributes:\n")
            text = google(text)
            obj.docstring.value = _REFERENCE.sub(lambda found, obj=obj: _linked(found, obj, paths), text)


def google(text: str) -> str:
    """A docstring as Google's style has it.

    Args:
        text (`str`): its text, without indentation.
    """
    return _SECTION.sub(_section, text)


def _section(found: re.Match) -> str:
    title, body = found.groups()
    if title in ("Args", "Attributes"):
        return f"{title}:\n{_NAMED.sub(_entries, body)}"
    return f"{title}:\n{_TYPED.sub(lambda entry: f'    {_plain(entry[1])}:', body)}"


def _entries(found: re.Match) -> str:
    """One entry for each of the names that share one."""
    names, kind, rest = found.groups()
    kind = _plain(_OPTIONAL.sub("", kind or ""))
    return "\n".join(f"    {name}{f' ({kind})' if kind else ''}:{rest}" for name in names.split(", "))


def _plain(kind: str) -> str:
    """A type without backticks and brackets, alternatives as Python writes them."""
    kind = _REFERENCE.sub(r"\2", kind).replace("`", "").replace(" or ", ", ")
    parts, depth = [""], 0
    for character in kind:
        depth += (character in "[(") - (character in "])")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return " | ".join(part.strip() for part in parts)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _linked(found: re.Match, obj: griffe.Object, paths: dict[str, str]) -> str:
    """A reference as a link to its page, if it has one; a name of another library is only printed."""
    short, name = found.groups()
    head, dot, rest = name.partition(".")
    try:
        path = obj.resolve(head) + dot + rest
    except griffe.NameResolutionError:
        if head not in paths and not short:
            logger.warning("%s refers to %s, which does not exist", obj.path, name)
        path = paths.get(head, head) + dot + rest
    parts = name.split(".")
    shown = ".".join(parts[-2 if parts[-2][:1].isupper() else -1 :]) if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
