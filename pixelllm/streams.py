"""The records of one source of the training mixture, streamed from Parquet shards.

`datasets` reads the shards in passing and splits them between the walks; what it does not give
is a shuffle that a resume repeats, since it forgets its shuffle buffer. Here a walk shuffles one
window of records after another, so its state is where the window began and a place in it.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from math import gcd, lcm
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node

from pixelllm.config import Source
from pixelllm.records import FEATURES, Record, from_row
from pixelllm.shards import ShardedTable
from pixelllm.sources import epoch_order
from pixelllm.tables import caption_lengths, records_with_task

START = {"turn": 0, "epoch": 0, "window": 0, "taken": 0, "stream": None}
WALKS = 16  # divided between the readers
SHUFFLED = 4096  # records in the windows of all walks together


def num_walks(num_shards: int, num_readers: int) -> int:
    """A number of walks that readers can share evenly.

    It is the same for all numbers of readers that divide it, and so are the batches then.
    """
    return lcm(gcd(num_shards, WALKS), num_readers)


class Walk:
    """An endless random walk through a share of the shards, by batches.

    Every epoch has the shards in another order, and with it other shares.

    Args:
        files: all shards.
        task: records without its phrases are passed over.
        number, of: which share; by shards where their number allows it, else every `of`-th record.
        window: records that are shuffled together, and held in memory.
        state: where to start, from `state_dict`.
    """

    def __init__(
        self,
        files: Sequence[str],
        task: str,
        batch_size: int,
        seed: int,
        number: int,
        of: int,
        window: int,
        state: dict[str, Any],
    ) -> None:
        self.files = files
        self.task = task
        self.batch_size = batch_size
        self.seed = seed
        self.number = number
        self.of = of
        self.window = window
        self.turn = state["turn"]
        self._open_epoch(state["epoch"], state["stream"])
        self._window = state["window"]
        self._read_window()
        self._taken = state["taken"]

    def state_dict(self) -> dict[str, Any]:
        """Where the walk stands, as JSON."""
        return {
            "turn": self.turn,  # batches given so far
            "epoch": self._epoch,
            "window": self._window,
            "taken": self._taken,
            "stream": self._before,
        }

    def _open_epoch(self, epoch: int, state: dict[str, Any] | None) -> None:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.files))
        files = [glob.escape(self.files[i]) for i in order]
        shards = load_dataset(
            "parquet", data_files=files, split="train", streaming=True, features=FEATURES
        )
        self._stream = split_dataset_by_node(shards, self.number, self.of).with_format("arrow")
        if state is not None:
            self._stream.load_state_dict(state)
        self._windows = self._stream.iter(self.window)
        self._epoch = epoch
        self._window = 0
        self._is_empty = state is None

    def _read_window(self) -> None:
        """Read the next window into memory, in the order of the walk; none at an epoch's end."""
        self._before = self._stream.state_dict()
        self._taken = 0
        try:
            self._rows = next(self._windows, FEATURES.arrow_schema.empty_table())
        except pa.ArrowInvalid as error:  # the library has logged which
            raise ValueError(f"a shard beside {self.files[0]} is damaged: {error}") from error
        phrases = self._rows.column("phrases")
        mine = records_with_task(phrases, self.task)
        rng = np.random.default_rng([self.seed, self._epoch, self.number, self._window])
        order = epoch_order(caption_lengths(phrases)[mine], self.batch_size, rng)
        self._at_end = len(self._rows) == 0
        self._is_empty &= len(mine) == 0
        self._rows = self._rows.take(pa.array(mine[order]))

    def _advance(self) -> None:
        """Go on to the next window, of the next epoch where this one ends."""
        if not self._at_end:
            self._window += 1
        elif self._is_empty:
            raise ValueError(
                f"share {self.number + 1} of {self.of} of {self.files[0]} and "
                f"{len(self.files) - 1} more shards has no record with a {self.task!r} phrase; "
                "make more shards, or use fewer processes and --train.workers"
            )
        else:
            self._open_epoch(self._epoch + 1, None)
        self._read_window()

    def next_batch(self) -> list[Record]:
        """The records of the next batch."""
        rows = []
        while len(rows) < self.batch_size:
            part = self._rows.slice(self._taken, self.batch_size - len(rows))
            rows += part.to_pylist()
            self._taken += len(part)
            if len(rows) < self.batch_size:
                self._advance()
        self.turn += 1
        return [from_row(row) for row in rows]

    def skip(self, num_batches: int) -> None:
        """Pass over batches without decoding their records."""
        left = num_batches * self.batch_size
        while left > (here := len(self._rows) - self._taken):
            left -= here
            self._advance()
        self._taken += left
        self.turn += num_batches


class StreamedRecords:
    """The records of one source in shards, as walks that readers divide between them.

    Readers must ask each walk for its batches in order, else it reads all before them again.
    """

    def __init__(
        self, tables: Sequence[ShardedTable], source: Source, batch_size: int, seed: int
    ) -> None:
        self.files = [file for table in tables for file in table.files]
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.share(1, {})

    def share(self, num_readers: int, saved: dict[str, Any]) -> None:
        """Divide the walks; states `saved` of as many walks through as many shards are used."""
        self.num_walks = num_walks(len(self.files), num_readers)
        self._saved = saved
        self._walks: dict[int, Walk] = {}

    def _key(self, walk: int) -> str:
        return f"{walk} of {self.num_walks} through {len(self.files)} shards"

    def _open(self, number: int, state: dict[str, Any]) -> Walk:
        window = max(SHUFFLED // self.num_walks, 2 * self.batch_size)
        facts = (self.files, self.source.task, self.batch_size, self.seed)
        return Walk(*facts, number, self.num_walks, window, state)

    def batch(self, step: int, turn: int) -> list[Record]:
        """The batch at place `turn` of the walk of `step`."""
        number = step % self.num_walks
        walk = self._walks.get(number)
        if walk is None or walk.turn > turn:
            saved = self._saved.get(self._key(number), START)
            walk = self._open(number, saved if saved["turn"] <= turn else START)
            self._walks[number] = walk
        walk.skip(turn - walk.turn)
        return walk.next_batch()

    def state(self, step: int) -> dict[str, Any]:
        """Of the walk of `step`, by its name."""
        number = step % self.num_walks
        return {self._key(number): self._walks[number].state_dict()}

    def sample(self, count: int) -> list[Record]:
        """The first `count` records of an epoch; where it has no more, its full batches."""
        facts = (self.files, self.source.task, self.batch_size, self.seed)
        walk, records = Walk(*facts, 0, 1, SHUFFLED, START), []
        while len(records) < count:
            batch = walk.next_batch()
            if walk.state_dict()["epoch"]:
                break
            records += batch
        return records[:count]
