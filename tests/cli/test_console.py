from __future__ import annotations

from hf_atm.cli.console import score_table


def test_score_table():
    rows = {"merged": {"a": 0.5, "long_name": 0.25}, "expert": {"a": 1.0}}
    assert score_table(["a", "long_name"], rows, "eval") == (
        "eval          a  long_name  average\n"
        "-----------------------------------\n"
        "merged    0.500      0.250    0.375\n"
        "expert    1.000          -        -"
    )
