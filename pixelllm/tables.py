"""Arrow tables of records on disk: written whole or not at all, memory-mapped when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from pixelllm.files import written_whole
from pixelllm.records import FEATURES, Record, from_row, to_row

ARROW_FILE = "records.arrow"
REPORT_FILE = "report.json"


def write_table(records: Iterable[Record], path: Path | str, report: dict[str, Any]) -> int:
    """Write records and a report to the folder `path`; returns the number of records.

    The folder appears under its name only when it is complete. `report` is written after the
    last record was taken, so the iterable may fill it. Raises ValueError on no record at all,
    FileExistsError where `path` already holds something that is not a table.
    """
    path = Path(path)
    if path.exists() and not (path / ARROW_FILE).exists():
        raise FileExistsError(f"{path} exists and is not a table of records; choose another name")
    with written_whole(path) as beside:
        beside.mkdir()
        count = _write_arrow(records, beside / ARROW_FILE)
        if count == 0:
            raise ValueError(f"{path}: no record to write; report: {json.dumps(report)}")
        (beside / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return count


def _write_arrow(records: Iterable[Record], file: Path) -> int:
    with ArrowWriter(path=str(file), features=FEATURES) as writer:
        count = 0
        for record in records:
            writer.write(to_row(record))
            count += 1
        if count:
            writer.finalize()
    return count


class Table:
    """A table of records, read by position without loading the file.

    Raises FileNotFoundError where `path` is not a table, ValueError where it is empty or damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        file = self.path / ARROW_FILE
        if not file.exists():
            raise FileNotFoundError(
                f"{self.path} is not a table of records ({ARROW_FILE} is missing; "
                "Parquet shards are for training on alone); "
                "make one with a reader, e.g. python -m data.localized_narratives"
            )
        try:
            self.rows = Dataset.from_file(str(file))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is damaged, make the table again: {error}") from error
        if len(self.rows) == 0:
            raise ValueError(f"{self.path}: the table holds no record")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return from_row(self.rows[index])

    def images(self) -> Iterator[Record]:
        """All records in turn, without their phrases, which take most of the time to read."""
        for batch in self.rows.data.select(["id", "size", "image"]).to_batches():
            for row in batch.to_pylist():
                yield from_row(row | {"phrases": ()})

    def has_task(self, task: str) -> bool:
        """Whether there are phrases of `task`."""
        return len(self.positions(task)) > 0

    def has_masks(self, task: str) -> bool:
        """Whether a phrase of `task` has a mask."""
        for phrases in self.phrases(len(self)):
            masked = pc.not_equal(phrases.field("mask_counts"), "")
            if pc.any(pc.and_(masked, pc.equal(phrases.field("task"), task))).as_py():
                return True
        return False

    def positions(self, task: str) -> np.ndarray:
        """Of the records with phrases of `task`, int64[n] ascending."""
        return records_with_task(self.rows.data.column("phrases"), task)

    def phrases(self, limit: int) -> Iterator[pa.StructArray]:
        """The phrases of the first `limit` records."""
        for chunk in self.rows.data.column("phrases").slice(0, limit).chunks:
            yield chunk.flatten()


def records_with_task(phrases: pa.ChunkedArray, task: str) -> np.ndarray:
    """Positions in the column `phrases` that have one of `task`, int64[n] ascending."""
    found, offset = [np.zeros(0, np.int64)], 0
    for chunk in phrases.chunks:
        tasks = pc.struct_field(pc.list_flatten(chunk), "task")
        parents = pc.list_parent_indices(chunk).filter(pc.equal(tasks, task))
        found.append(np.unique(parents.to_numpy(zero_copy_only=False)) + offset)
        offset += len(chunk)
    return np.concatenate(found)


def caption_lengths(phrases: pa.ChunkedArray) -> np.ndarray:
    """Characters of every record's first caption, int64[n]."""
    lengths = [np.zeros(0, np.int64)]
    for chunk in phrases.chunks:
        first = pc.list_element(pc.list_slice(chunk, 0, 1), 0)
        length = pc.utf8_length(pc.struct_field(first, "caption"))
        lengths.append(length.to_numpy(zero_copy_only=False))
    return np.concatenate(lengths)
