"""Tables of records as Parquet shards: written one after another, read in passing.

Where an Arrow table (`pixelllm.tables`) must lie on a local disk, shards may lie anywhere that
fsspec reads, such as the Hugging Face Hub or S3, and be larger than any disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixelllm.files import write_text, written_whole
from pixelllm.records import FEATURES, Record, to_row
from pixelllm.tables import ARROW_FILE, REPORT_FILE, Table

ROW_GROUP = 256  # records that a reader decodes at once


class ShardedTable:
    """A table of records in Parquet shards.

    Args:
        source: a folder of shards, a glob or a single shard; a path or a URL (`hf://`, `s3://`).

    Raises FileNotFoundError where there is no shard, ValueError where they hold no records,
    ConnectionError naming a URL that cannot be reached.
    """

    def __init__(self, source: Path | str) -> None:
        self.path = str(source)
        parts = [part for part in self.path.split("/") if part]
        is_folder = "*" not in parts[-1] and not parts[-1].endswith(".parquet")
        self.name = "/".join(parts[-1 if is_folder else -2 :])  # files may tell corpora apart
        try:
            self._system, path = fsspec.core.url_to_fs(self.path)
            self._paths = self._shards(path)
        except ImportError as error:  # the package of the storage, which it names
            raise ValueError(f"{self.path}: {error}") from error
        except OSError:
            raise
        except Exception as error:  # storages have errors of their own
            if "://" not in self.path:
                raise
            raise ConnectionError(f"{self.path} cannot be reached: {error}") from error
        with self._system.open(self._paths[0], "rb") as file:
            try:
                self._footer = pq.read_metadata(file)
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"{self._paths[0]} is not a whole Parquet file: {error}"
                ) from error
        missing = set(FEATURES) - set(self._footer.schema.to_arrow_schema().names)
        if missing:
            raise ValueError(
                f"{self._paths[0]} has no columns {sorted(missing)}, so it holds no records; "
                "make shards with python -m data.parquet"
            )

    def _shards(self, path: str) -> list[str]:
        if "*" in path:
            found = self._system.glob(path)
        elif path.endswith(".parquet"):
            found = [path]
        else:
            files = self._system.ls(path, detail=False)
            found = [file for file in files if file.endswith(".parquet")]
        if not found:
            raise FileNotFoundError(f"{self.path}: no Parquet shard there")
        return sorted(found)

    @property
    def files(self) -> list[str]:
        """The shards in order, as URLs."""
        return [self._system.unstrip_protocol(path) for path in self._paths]

    def has_task(self, task: str) -> bool:
        """Whether the first shard has phrases of `task`."""
        return task in self._tasks

    def has_masks(self, task: str) -> bool:
        """Whether a phrase of `task` in the first shard has a mask."""
        for phrases in self._first_phrases("task", "mask_counts"):
            masked = pc.not_equal(pc.struct_field(phrases, "mask_counts"), "")
            if pc.any(pc.and_(masked, pc.equal(pc.struct_field(phrases, "task"), task))).as_py():
                return True
        return False

    @cached_property
    def _tasks(self) -> set[str]:
        parts = self._first_phrases("task")
        return {task for part in parts for task in pc.struct_field(part, "task").to_pylist()}

    def _first_phrases(self, *names: str) -> Iterator[pa.StructArray]:
        """These fields of the first shard's phrases, part by part."""
        columns = [f"phrases.list.element.{name}" for name in names]
        with self._system.open(self._paths[0], "rb") as file:
            try:
                for rows in pq.ParquetFile(file).iter_batches(ROW_GROUP, columns=columns):
                    yield rows.column("phrases").flatten()
            except pa.ArrowInvalid as error:
                raise ValueError(f"{self._paths[0]} is damaged: {error}") from error

    def phrases(self, limit: int) -> Iterator[pa.StructArray]:
        """The phrases of the first `limit` records."""
        for path in self._paths:
            if limit <= 0:
                return
            with self._system.open(path, "rb") as file:
                try:
                    shard = pq.ParquetFile(file)
                except pa.ArrowInvalid as error:
                    raise ValueError(f"{path} is not a whole Parquet file: {error}") from error
                for batch in shard.iter_batches(ROW_GROUP, columns=["phrases"]):
                    yield batch.column("phrases").slice(0, max(limit, 0)).flatten()
                    limit -= len(batch)


def open_table(source: Path | str) -> Table | ShardedTable:
    """The table at `source`, in whichever of the two forms it is.

    Raises FileNotFoundError or ValueError where there is none.
    """
    is_local = "://" not in str(source)
    if is_local and (Path(source) / ARROW_FILE).exists():
        return Table(source)
    has_shards = not is_local or "*" in str(source) or Path(source).suffix == ".parquet"
    if has_shards or any(Path(source).glob("*.parquet")):
        return ShardedTable(source)
    return Table(source)  # says what is missing


def _unfinished(path: Path | str) -> Path:
    return Path(path).with_name(Path(path).name + ".unfinished")


def unfinished_shards(path: Path | str, plan: object) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """What an interrupted `write_shards` to `path` left: reports, and ids of the phrases, by shard.

    Args:
        plan: JSON of all that decides the records. Shards of another plan are removed.

    Raises FileExistsError where `path` is not a table.
    """
    if Path(path).exists() and not (Path(path) / REPORT_FILE).exists():
        raise FileExistsError(f"{path} exists and is not a table of records; choose another name")
    folder = _unfinished(path)
    file = folder / "plan.json"
    if folder.exists() and not (file.exists() and json.loads(file.read_text()) == plan):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(plan))
    for shard in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(shard) as opened:
            report = json.loads(opened.metadata.metadata[b"report"])
            ids = opened.read(columns=["phrases.list.element.id"]).column("phrases")
            yield report, pc.struct_field(pc.list_flatten(ids), "id").to_pylist()


def check_shard_size(shard_size: int | None) -> None:
    """Raise ValueError unless shards of so many records can be; None is none."""
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shards hold 1 record or more, not {shard_size}")


def write_shards(
    records: Iterable[Record], path: Path | str, report: dict[str, Any], shard_size: int
) -> None:
    """Write records to the folder `path` in shards of `shard_size`, then the report.

    The folder appears under its name when it is complete. Until then whole shards wait beside it
    and are added to, so records must be those after `unfinished_shards`. Memory holds one row
    group. Raises ValueError on no record at all.
    """
    path, folder = Path(path), _unfinished(path)
    number = len(list(folder.glob("*.parquet")))
    records = iter(records)
    while first := list(islice(records, 1)):
        with written_whole(folder / f"{number:05d}.parquet") as beside:
            _write_shard(chain(first, islice(records, shard_size - 1)), beside, report)
        number += 1
    if number == 0:
        shutil.rmtree(folder)
        raise ValueError(f"{path}: no record to write; report: {json.dumps(report)}")
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    if path.exists():
        shutil.rmtree(path)
    folder.rename(path)


def _write_shard(records: Iterator[Record], file: Path, report: dict[str, Any]) -> None:
    with pq.ParquetWriter(file, FEATURES.arrow_schema, compression="zstd") as writer:
        while rows := [to_row(record) for record in islice(records, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, FEATURES.arrow_schema))
        writer.add_key_value_metadata({"report": json.dumps(report)})
