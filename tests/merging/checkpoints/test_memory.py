"""Memory that is not backed by files stays far below the size of one model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from .testing_utils import write_models


WATCH = """
import json, sys, threading
from hf_atm.merging import merge_checkpoints

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

recipe, out = json.loads(sys.argv[1]), sys.argv[2]
estimate = merge_checkpoints(recipe, out, dry_run=True, threads=1).peak_bytes
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
merge_checkpoints(recipe, out, progress=False, threads=1)
done.set()
watcher.join()
print(json.dumps([estimate, peak - before]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("method", "limit"), [("task_arithmetic", 0.5), ("ties", 2.0)])
def test_peak(method, limit, tmp_path):
    # One tensor that takes 67 MB in float32, and smaller ones.
    shapes = {"a.weight": (4096, 4096), "b.weight": (512, 1024), "c.weight": (512, 1024)}
    recipe = {**write_models(tmp_path, 3, torch.bfloat16, shapes), "merge_method": method}
    command = [sys.executable, "-c", WATCH, json.dumps(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    estimate, measured = json.loads(done.stdout)
    largest = 4096 * 4096 * 4
    assert measured < limit * largest
    # Allocators keep a few megabytes of their own.
    assert measured < 1.2 * estimate + 12e6 and estimate < limit * largest
