"""Threads for products and assignments, whose number changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


Map = Callable[[Callable[..., Any], Iterable[Any]], list[Any]]


@contextmanager
def workers() -> Iterator[Map]:
    """
    A map over as many threads as torch has, results in order.

    Torch itself runs on one thread inside, so that no sum is split by the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield lambda function, items: [function(item) for item in items]
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, items: list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
