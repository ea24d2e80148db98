"""Stopping on request: the step in flight is finished, a checkpoint is written, then we leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StopRequest(Exception):
    """Training was asked to stop; `code` is the exit status a shell expects."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    class Flag:
        """Set by the signal handler, read by the loop."""

        def __init__(self) -> None:
            self.signal: int | None = None

        @property
        def requested(self) -> bool:
            return self.signal is not None

        def raise_if_requested(self, out: Path, step: int) -> None:
            if self.signal is not None:
                raise StopRequest(
                    f"stopped after step {step}; go on with --resume --out {out}",
                    128 + self.signal,
                )

    @staticmethod
    @contextmanager
    def on_signals(at_once_again: bool = True) -> Iterator[Flag]:
        """Turn SIGINT and SIGTERM into a flag.

        Args:
            at_once_again: a second one ends the process at once. Not under torchrun, which may
                pass on what the process was sent already, and kills what takes too long.
        """
        flag = StopRequest.Flag()

        def handle(number: int, _frame: object) -> None:
            if flag.requested and at_once_again:
                raise KeyboardInterrupt
            flag.signal = number

        previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield flag
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def ignore_interrupts(_worker: int) -> None:
    """Let the loader's processes live on when all are told to stop: the step still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Torchrun passes SIGTERM on to them too; a second one comes from whom they work for.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
