"""Stopping on request: the step in flight is finished, a checkpoint is written, then we leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StopRequest(Exception):
    """Training was asked to stop by a signal; `code` is the exit status a shell expects."""

    def __init__(self, number: int, out: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; go on with --resume --out {out}")
        self.code = 128 + number


@contextmanager
def stop_signals(at_once_again: bool = True) -> Iterator[list[int]]:
    """The numbers of the SIGINTs and SIGTERMs that came so far, in a list that grows.

    Args:
        at_once_again: a second one ends the process at once. Not under torchrun, which may
            pass on what the process was sent already, and kills what takes too long.
    """
    came: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if came and at_once_again:
            raise KeyboardInterrupt
        came.append(number)

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interrupts(_worker: int) -> None:
    """Let the loader's processes live on when all are told to stop: the step still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Torchrun passes SIGTERM on to them too; a second one comes from whom they work for.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
