"""Commands and settings that README and docs show: they parse, and name what exists."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import pytest
import yaml

from hf_atm import ATMConfig
from hf_atm.baselines import parse_members
from hf_atm.cli.experiment import parse_settings
from hf_atm.cli.main import build_parser
from hf_atm.continual import ContinualSettings
from hf_atm.fewshot import FewShotConfig
from hf_atm.merging import read_recipe

from .pages import COMMAND_PAGES, ROOT, blocks, code_spans, commands


HF_ATM, MAKE, PYTHON = commands("hf-atm"), commands("make"), commands("python")
YAML = blocks("yaml")
# What may follow a command's own arguments.
SETTINGS = {"train": ATMConfig, "compare": ATMConfig, "refine": ATMConfig, "fewshot": FewShotConfig}
SUBCOMMANDS = set(build_parser()._subparsers._group_actions[0].choices)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# Keys of the files of `hf-atm train`, in the sections that pages show.
SECTIONS = {"training", "compare", "schedule", "continual", "model", "tasks"}


def words_of(line):
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("line", HF_ATM)
def test_a_command_parses(line):
    words = words_of(line)[1:]
    args, rest = build_parser().parse_known_args(words)
    assert not rest or args.command in SETTINGS, rest
    known = {f.name for f in fields(SETTINGS[args.command]) if f.init} if rest else set()
    unknown = [word for word in rest if word.startswith("--") and word.removeprefix("--") not in known]
    assert not unknown
    for path in (word for word in words if word.startswith("examples/")):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_exists(line):
    assert words_of(line)[1] in TARGETS


@pytest.mark.parametrize("line", PYTHON)
def test_a_script_exists(line):
    script = words_of(line)[1]
    assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_exist(page):
    for span in code_spans(page):
        if found := re.match(r"hf-atm ([a-z]+)", span):
            assert found[1] in SUBCOMMANDS, span
        if found := re.match(r"make ([a-z-]+)$", span):
            assert found[1] in TARGETS, span
        if found := re.match(r'python -c "(.*)"$', span):
            exec(compile(found[1], span, "exec"), {"help": lambda thing: thing})


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_extras_exist(page):
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = \[", section.split("\n[")[0], re.MULTILINE))
    for named in re.findall(r"\.\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
        assert set(named.split(",")) <= extras, named


@pytest.mark.parametrize("block", YAML)
def test_settings_in_yaml_are_settings(block):
    content = yaml.safe_load(block)
    if "merge_method" in content:
        read_recipe(content)
        return
    assert set(content) <= SECTIONS
    parse_settings(content.get("training", {}))
    parse_members(content.get("compare", {"members": ["atm"]})["members"])
    ContinualSettings.parse(content.get("continual", {}))


def test_there_is_something_to_check():
    assert len(HF_ATM) >= 20 and len(MAKE) >= 5 and len(PYTHON) >= 10 and len(YAML) >= 4
