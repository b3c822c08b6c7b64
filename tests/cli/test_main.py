from __future__ import annotations

import subprocess
import sys

import pytest

from hf_atm import __version__
from hf_atm.cli.main import build_parser, main


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom hf_atm.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'yaml', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "demo" in result.stdout


def test_module_and_version():
    assert run("-m", "hf_atm.cli", "--version").stdout == f"hf-atm {__version__}\n"


def test_commands():
    text = build_parser().format_help()
    assert all(name in text for name in ("demo", "train", "evaluate", "inspect", "card"))
    assert "landscape" in text and "push" in text


@pytest.mark.parametrize("arguments", [[], ["merge"], ["demo", "--fast"], ["train"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_an_error_is_one_sentence(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    expected = "hf-atm: error: config 'nowhere.yaml' does not exist; see examples/configs for a start\n"
    assert output.err == expected


@pytest.mark.parametrize("arguments", [["--debug", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--debug"]])
def test_debug_shows_the_traceback(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_names_its_type(monkeypatch, capsys):
    from hf_atm.cli import commands

    def fail(*args, **kwargs):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(commands, "train", fail)
    assert main(["train", "x.yaml"]) == 1
    assert capsys.readouterr().err == "hf-atm: RuntimeError: two lines (--debug shows where)\n"


def test_interruption(monkeypatch, capsys):
    from hf_atm.cli import commands

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupt)
    assert main(["train", "x.yaml"]) == 130
    assert "interrupted" in capsys.readouterr().err
