"""The records of one source of the training mixture, at random access in Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixelllm.batches import Prompted, fill
from pixelllm.config import Source
from pixelllm.records import Record
from pixelllm.tables import Table, caption_lengths, records_with_task


def epoch_order(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order in which neighbours that share a batch have captions of like length.

    Sorting the captions of eight batches at a time saves most of the padding.
    """
    order = rng.permutation(len(lengths))
    batches = [order[:0]]
    for start in range(0, len(order), 8 * batch_size):
        window = order[start : start + 8 * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        parts = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [parts[i] for i in rng.permutation(len(parts))]
    return np.concatenate(batches)


def choose_phrases(source: Source, record: Record, rng: np.random.Generator) -> Prompted:
    """Draw the phrases of the source and a context for each; rounds are the first ones."""
    mine = [phrase for phrase in record.phrases if phrase.task == source.task]
    count = min(len(mine), source.phrases_per_image)
    order = range(count) if source.in_turn else rng.permutation(len(mine))[:count]
    phrases = tuple(mine[i] for i in order)
    drawn = rng.integers(len(source.contexts), size=count)
    contexts = (fill(source.contexts[i], p) for i, p in zip(drawn, phrases, strict=True))
    return Prompted(record, phrases, tuple(contexts))


class SourceRecords:
    """The records of one source over all tables, in a new random order every epoch.

    One walk serves any number of readers, since any of its places can be read at once.
    """

    num_walks = 1

    def __init__(self, tables: Sequence[Table], source: Source, batch_size: int, seed: int) -> None:
        self.tables = tables
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        phrases = [table.rows.data.column("phrases") for table in tables]
        found = [records_with_task(column, source.task) for column in phrases]
        self.rows = np.concatenate(
            [np.stack([np.full(len(f), number), f], axis=1) for number, f in enumerate(found)]
        )  # (n, 2): table, record
        self.lengths = np.concatenate(
            [caption_lengths(column)[f] for column, f in zip(phrases, found, strict=True)]
        )
        self._order: tuple[int, np.ndarray] | None = None

    def share(self, num_readers: int, saved: dict[str, Any]) -> None:
        pass

    def state(self, step: int) -> dict[str, Any]:
        return {}

    def __getitem__(self, position: int) -> Record:
        """The record at `position` of the endless walk."""
        epoch, index = divmod(position, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, epoch_order(self.lengths, self.batch_size, rng))
        table, record = self.rows[self._order[1][index]]
        return self.tables[table][int(record)]

    def batch(self, step: int, turn: int) -> list[Record]:
        """The batch at place `turn` of the walk."""
        first = turn * self.batch_size
        return [self[first + i] for i in range(self.batch_size)]

    def sample(self, count: int) -> list[Record]:
        """The first `count` records of the walk, none twice."""
        return [self[position] for position in range(min(count, len(self.rows)))]
