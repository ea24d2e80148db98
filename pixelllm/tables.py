"""Arrow tables of records on disk: written whole or not at all, memory-mapped when read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
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
        file = self.path / ARROW_FILE
        if not file.exists():
            raise FileNotFoundError(
                f"{self.path} is not a table of records ({ARROW_FILE} is missing); "
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
