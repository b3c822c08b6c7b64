"""The examples and the benchmark, on little."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_atm.latent import aggregate_latent_spaces

from .conftest import as_dicts
from .reference import aggregate


ROOT = Path(__file__).resolve().parents[2]


def tables(text):
    """Rows of all Markdown tables: cells by first cells."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in rows if not set(row[0]) <= {"-"}]


def run(script):
    command = [sys.executable, str(ROOT / "examples" / script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return tables(done.stdout)


@pytest.mark.slow
def test_cifar_settings_on_synthetic_pictures():
    rows = run("latent_cifar100.py")
    assert rows[0] == ["setting", "space", "probe", "centroid", "separability", "CKA to end to end"]
    found = {(row[0], row[1]): row[2:] for row in rows[1:]}
    settings = {setting for setting, _ in found}
    assert settings == {"1, S=12", "1, S=8", "2", "3"} and len(found) == 7 * 4
    for setting in settings:
        assert found[setting, "end to end"][3] == found[setting, "end to end, relative"][3] == "1.000"
        for space in ("naive, oracle", "RLSA, oracle", "RLSA, average", "side by side"):
            # Twenty classes: guessing is right in one of twenty.
            assert float(found[setting, space][0]) > 0.2
    assert found["1, S=12", "naive, oracle"][3] == "-" and found["3", "naive, oracle"][3] != "-"


@pytest.mark.slow
def test_text_on_random_encoders():
    rows = run("latent_text.py")
    start = next(number for number, row in enumerate(rows) if row[0] == "space")
    rounds = rows[1:start]
    assert [row[0] for row in rounds] == ["1", "2"]
    assert all(float(cell) > 0.9 for row in rounds for cell in row[1:])
    found = {row[0]: row[1:] for row in rows[start + 1 :]}
    assert {"before tuning", "ATM, merged weights", "experts, RLSA", "experts and Llama, RLSA"} <= set(found)
    assert all(re.fullmatch(r"\d\.\d{3}", cell) for row in found.values() for cell in row)
    assert float(found["experts, RLSA"][0]) > 0.5


@pytest.mark.parametrize("disjoint", [False, True])
def test_the_benchmark_aggregates_what_the_reference_does(disjoint):
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "latent" / "speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    sets = speed.make_sets(samples=120, spaces=5, width=9, anchors=16, disjoint=disjoint)
    ids, expected = aggregate(as_dicts(sets), list(range(16)))
    found = aggregate_latent_spaces(sets, range(16), chunk_size=32)
    assert found.ids.tolist() == ids == list(range(120))
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-6)
    routed = aggregate_latent_spaces(sets, range(16), routing="knn")
    assert routed.sources[16:].sum(1).tolist() == [1] * 104
