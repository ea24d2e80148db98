"""A function over many items by several processes, in order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

CHUNK = 32  # items a process takes at once; bounds the memory with PENDING
PENDING = 8  # chunks per process in flight

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterator[Item], num_proc: int
) -> Iterator[Result]:
    """`map` that holds few items and results at a time.

    Raises ChildProcessError where the system ended a process, and what `function` raises.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # safe beside threads
    with ProcessPoolExecutor(num_proc, mp_context=context) as pool:
        try:
            while some := list(islice(items, CHUNK * PENDING * num_proc)):
                yield from pool.map(function, some, chunksize=CHUNK)
        except BrokenProcessPool as error:
            killed = f"one of {num_proc} processes was killed, most often for its memory"
            raise ChildProcessError(f"{killed}; try a lower --num-proc") from error
