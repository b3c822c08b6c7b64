"""Several processes on one merge: who does what, and what they tell one another."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Processes:
    """The processes that accelerate or torchrun started together; one alone otherwise, without either being imported.

    All of them must see the same file system.
    """

    def __init__(self) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState
            from torch import distributed

            is_ours = not distributed.is_initialized()
            # What they exchange is small and lies on the CPU, wherever the arithmetic is done.
            self._state = PartialState(cpu=True)
            if is_ours:
                # Left to the end of the interpreter, threads of the group now and then abort the process.
                atexit.register(self._state.destroy_process_group)
            if self._state.num_processes != int(os.environ["WORLD_SIZE"]):
                raise RuntimeError(
                    f"{os.environ['WORLD_SIZE']} processes were started and do not see one another; start them with "
                    "accelerate launch or torchrun."
                )
        self.rank = self._state.process_index if self._state else 0
        self.count = self._state.num_processes if self._state else 1
        self.is_main = self.rank == 0

    def place(self, device: str | None) -> str | None:
        """The device of this process: its own one where each has an accelerator."""
        local_rank = os.environ.get("LOCAL_RANK")
        return f"cuda:{local_rank}" if device == "cuda" and self._state is not None and local_rank else device

    @property
    def local_count(self) -> int:
        """Processes on this machine, which share its cores."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def union(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The facts of all processes together."""
        if self._state is None:
            return dict(facts)
        from accelerate.utils import gather_object

        together: dict[str, Any] = {}
        for part in gather_object([dict(facts)]):
            together.update(part)
        return together

    def on_main(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls a function on the first process; if it raises, all do."""
        error: BaseException | None = None
        if self.is_main:
            try:
                function(*args)
            except Exception as caught:
                error = caught
        self.agree(error)

    def agree(self, error: BaseException | None) -> None:
        """Raises on every process if something went wrong on one, so that none waits for ever."""
        errors = self.union({str(self.rank): str(error)} if error is not None else {})
        if error is not None:
            raise error
        if errors:
            rank, reason = next(iter(sorted(errors.items())))
            raise RuntimeError(f"Process {rank} failed: {reason}")


def share_out(parts: Sequence[Sequence[str]], costs: Sequence[float], count: int) -> list[list[int]]:
    """
    Shares parts out over processes so that their costs are about equal.

    The dearest part first, each to whom has least so far; ties go to the lowest number, so all processes agree.

    Returns:
        `list[list[int]]`: indices of the parts of each process, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for index in sorted(range(len(parts)), key=lambda index: (-costs[index], index)):
        process = min(range(count), key=lambda process: (loads[process], process))
        shares[process].append(index)
        loads[process] += costs[index]
    return [sorted(share) for share in shares]
