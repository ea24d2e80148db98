"""The micro batches of a run, from any step on, for one process of any number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pixelllm.config import TrainConfig
from pixelllm.training.signals import ignore_interrupts


def loader(
    batches: Dataset, step: int, config: TrainConfig, rank: int = 0, num_processes: int = 1
) -> Iterator[Any]:
    """Micro batches from `step` on; a batch depends on its number alone, so this is a resume.

    A step takes `accumulate` numbers; process `rank` has every `num_processes`-th of them.
    """
    numbers = range(step * config.accumulate + rank, len(batches), num_processes)
    # With a generator of its own, the loader draws nothing from the state that a resume restores.
    own = torch.Generator().manual_seed(config.seed)
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=config.workers,
            generator=own,
            worker_init_fn=ignore_interrupts,
        )
    )
