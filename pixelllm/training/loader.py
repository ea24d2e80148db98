"""The micro batches of a run, from any step on, for one process of any number.

A batch depends on its number alone, so going on at a step is a resume. Streamed sources
(`pixelllm.streams`) would have to read all before it again; the state saved here spares that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pixelllm.config import TrainConfig
from pixelllm.mixture import Mixture
from pixelllm.training.signals import ignore_interrupts


def loader(
    batches: Dataset,
    step: int,
    config: TrainConfig,
    rank: int = 0,
    num_processes: int = 1,
    saved: dict[str, Any] | None = None,
) -> MicroBatches:
    """Micro batches from `step` on.

    A step takes `accumulate` numbers; process `rank` has every `num_processes`-th of them.

    Args:
        saved: `MicroBatches.state_dict` of all processes, merged; of any number of them.
    """
    saved = dict(saved or {})
    if isinstance(batches, Mixture):
        batches.share(num_processes * max(config.workers, 1), saved)
    numbers = range(step * config.accumulate + rank, len(batches), num_processes)
    # With a generator of its own, the loader draws nothing from the state that a resume restores.
    own = torch.Generator().manual_seed(config.seed)
    given = DataLoader(
        _Answers(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=config.workers,
        generator=own,
        worker_init_fn=ignore_interrupts,
    )
    return MicroBatches(iter(given), saved)


class MicroBatches:
    """An iterator that knows where the streams stand after the batches it gave."""

    def __init__(self, answers: Iterator[Any], states: dict[str, Any]) -> None:
        self._answers = answers
        self._states = states

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        answer = next(self._answers)
        if isinstance(answer, ConnectionError):  # of a storage, not of a process that died
            raise OSError(f"{answer}; the last checkpoint is intact, --resume goes on") from answer
        if isinstance(answer, Exception):
            raise answer
        batch, state = answer
        self._states |= state
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, as JSON; what was read ahead does not count."""
        return dict(self._states)


class _Answers(Dataset):
    """Batches with the state of their stream after them, or what is wrong with their data.

    An error travels as a value: the loader would wrap its message in a traceback.
    """

    def __init__(self, batches: Dataset) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> tuple[Any, dict[str, Any]] | Exception:
        try:
            batch = self.batches[number]
        except (ValueError, OSError) as error:
            return error
        return batch, self.batches.state(number) if isinstance(self.batches, Mixture) else {}


@contextmanager
def named_deaths(num_workers: int) -> Iterator[None]:
    """Around the loop, say what it means that the system ended a process that loads data.

    Torch notices that at any moment, or the tensors on their way break off. Raises
    ChildProcessError.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        reason = str(error).strip().rstrip(".")
        if num_workers and isinstance(error, (ConnectionError, EOFError)):
            reason = f"DataLoader worker died: {reason or type(error).__name__}"
        elif not reason.startswith("DataLoader worker"):
            raise
        if threading.current_thread() is threading.main_thread():
            # Torch would report the same death again at every later signal of a child.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise ChildProcessError(
            f"{reason}. Most likely memory ran out: lower --train.workers "
            f"(now {num_workers}) and go on with --resume; the last checkpoint is intact"
        ) from error
