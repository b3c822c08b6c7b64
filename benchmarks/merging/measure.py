"""Seconds and peak memory of a whole process with its children, from /proc (Linux)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


SAMPLE_EVERY = 0.02


@dataclass(frozen=True)
class Run:
    """One finished process.

    Args:
        seconds (`float`): wall time from start to end.
        processor_seconds (`float`): user and system time of the process and the children it waited for.
        peak_bytes (`int`): largest sampled sum, over the process tree, of anonymous and shared resident memory; pages
            of mapped files are left out, since the system takes them back whenever it likes.
        returncode (`int`): exit status.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int
    returncode: int


def run(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end; its output goes to `log`.

    Pages that earlier writers left behind are written out first, so that no run pays for another's.
    """
    os.sync()
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=dict(environment or os.environ)
        )
        sampler = PeakSampler(process.pid)
        sampler.start()
        # wait4 instead of wait: only it gives the processor time of this one child.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = sampler.stop()
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, process.returncode)


class PeakSampler(threading.Thread):
    """Keeps the largest memory of a process tree; a peak shorter than `SAMPLE_EVERY` may be missed."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(SAMPLE_EVERY):
            self.peak = max(self.peak, sum(map(resident_bytes, process_tree(self.pid))))

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.peak


def process_tree(pid: int) -> list[int]:
    """The process and its descendants, whichever thread started them."""
    tree, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        tree.append(current)
        try:
            threads = os.listdir(f"/proc/{current}/task")
        except OSError:  # it has just ended
            continue
        for thread in threads:
            waiting += map(int, read_proc(f"/proc/{current}/task/{thread}/children").split())
    return tree


def resident_bytes(pid: int) -> int:
    """Resident memory that no file backs. Memory shared by several processes counts once in each."""
    fields = ("RssAnon:", "RssShmem:")
    lines = read_proc(f"/proc/{pid}/status").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(fields))


def read_proc(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:  # processes and threads end at any moment
        return ""
