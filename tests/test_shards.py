"""Parquet shards: what is written comes back, from anywhere, and an interruption costs little."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_tables import EMBEDDED, FULL

import data.parquet
from pixelllm.records import Phrase, Record, from_row
from pixelllm.shards import ShardedTable, open_table, unfinished_shards, write_shards
from pixelllm.tables import Table, write_table


def records(count: int) -> list[Record]:
    return [
        Record(f"r{i}", (4, 5), (Phrase(f"p{i}", "narration", f"car {i}"),), path="x.png")
        for i in range(count)
    ]


def write(folder: Path, given: list[Record], shard_size: int = 3) -> Path:
    assert not list(unfinished_shards(folder, ["plan"]))
    write_shards(given, folder, {"kept": len(given)}, shard_size)
    return folder


def read(table: ShardedTable) -> list[Record]:
    """The records of every shard, in order."""
    rows = []
    for url in table.files:
        with fsspec.open(url) as file:
            rows += pq.read_table(file).to_pylist()
    return [from_row(row) for row in rows]


def test_shards_give_their_records_back(tmp_path: Path):
    """The folder's brackets would be a pattern to whom takes a path for a glob."""
    given = [FULL, EMBEDDED, *records(6)]
    folder = write(tmp_path / "shards[1]", given)
    table = open_table(folder)
    assert isinstance(table, ShardedTable) and table.name == "shards[1]"
    assert len(table.files) == 3 and read(table) == given
    assert [path.name for path in tmp_path.iterdir()] == ["shards[1]"]


@pytest.mark.parametrize("source", ["memory://corpus", "memory://corpus/*.parquet", "file"])
def test_shards_are_read_through_urls(tmp_path: Path, source: str):
    folder = write(tmp_path / "shards", records(7))
    if source == "file":
        source = f"file://{folder}"
    fsspec.filesystem("memory").put(str(folder), "/corpus", recursive=True)
    try:
        table = open_table(source)
        assert isinstance(table, ShardedTable) and read(table) == records(7)
    finally:
        fsspec.filesystem("memory").rm("/corpus", recursive=True)


def test_tasks_and_captions_are_told(tmp_path: Path):
    """Tasks before and after the one there is, in the order of letters."""
    given = records(7)
    tables = [open_table(write(tmp_path / "shards", given))]
    write_table(given, tmp_path / "table", {})
    tables.append(open_table(tmp_path / "table"))
    assert isinstance(tables[1], Table)
    for table in tables:
        assert table.has_task("narration")
        assert not table.has_task("caption") and not table.has_task("region")
        captions = [c for p in table.phrases(5) for c in p.field("caption").to_pylist()]
        assert captions == [f"car {i}" for i in range(5)]


def test_tasks_between_others_are_not_there_and_masks_are_told(tmp_path: Path):
    mask = {"size": [4, 5], "counts": "0d0"}
    phrases = (
        Phrase("a", "caption", "a car"),
        Phrase("b", "referring", "a car", context="a car", mask=mask),
    )
    table = open_table(write(tmp_path / "shards", [Record("x/1", (4, 5), phrases, path="x.jpg")]))
    assert table.has_task("caption") and table.has_task("referring")
    assert not table.has_task("narration")
    assert table.has_masks("referring") and not table.has_masks("caption")


def test_globs_and_single_shards_have_the_name_of_their_folder_too(tmp_path: Path):
    write(tmp_path / "coco_train", records(3))
    for source in ("", "/", "/*.parquet", "/00000.parquet"):
        name = open_table(f"{tmp_path}/coco_train{source}").name
        assert name == f"coco_train{source.rstrip('/')}"


def test_an_interrupted_call_is_gone_on_with(tmp_path: Path):
    report = {"read": 0}

    def counted(start: int, stop: int):
        for record in islice(records(10), start, stop):
            report["read"] += 1
            yield record
        if stop < 10:
            raise KeyboardInterrupt

    assert not list(unfinished_shards(tmp_path / "out", ["plan"]))
    with pytest.raises(KeyboardInterrupt):
        write_shards(counted(0, 8), tmp_path / "out", report, 3)
    assert not (tmp_path / "out").exists()
    left = list(unfinished_shards(tmp_path / "out", ["plan"]))
    assert left == [({"read": 3}, ["p0", "p1", "p2"]), ({"read": 6}, ["p3", "p4", "p5"])]
    report = left[-1][0]
    write_shards(counted(6, 10), tmp_path / "out", report, 3)
    assert read(ShardedTable(tmp_path / "out")) == records(10) and report == {"read": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_of_another_plan_are_not_mixed_in(tmp_path: Path):
    def failing():
        yield from records(4)
        raise RuntimeError("bad line")

    assert not list(unfinished_shards(tmp_path / "out", ["small images"]))
    with pytest.raises(RuntimeError, match="bad line"):
        write_shards(failing(), tmp_path / "out", {}, 3)
    assert not list(unfinished_shards(tmp_path / "out", ["large images"]))
    write_shards(records(2), tmp_path / "out", {}, 3)
    assert read(ShardedTable(tmp_path / "out")) == records(2)


def test_new_shards_replace_old_ones_alone(tmp_path: Path):
    write(tmp_path / "out", records(9))
    write(tmp_path / "out", records(2))
    assert read(ShardedTable(tmp_path / "out")) == records(2)
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileExistsError, match="photos exists and is not a table"):
        write(tmp_path / "photos", records(2))
    with pytest.raises(ValueError, match="no record to write; report"):
        write(tmp_path / "none", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_what_is_no_shard_of_records_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="none/: no Parquet shard there"):
        fsspec.filesystem("memory").mkdir("/none")
        open_table("memory://none/")
    with pytest.raises(FileNotFoundError, match="empty is not a table of records"):
        open_table(tmp_path / "empty")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no columns \['image', 'phrases', 'size'"):
        open_table(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match="b.parquet is not a whole Parquet file"):
        open_table(tmp_path / "b.parquet")


def test_a_storage_that_cannot_be_reached_is_named(monkeypatch):
    """Storages raise errors of their own libraries, which are no OSError."""

    def unreachable(*args, **options):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(MemoryFileSystem, "ls", unreachable)
    with pytest.raises(ConnectionError, match="memory://far cannot be reached: Name or service"):
        ShardedTable("memory://far")


def test_a_table_of_any_reader_becomes_shards(tmp_path: Path, monkeypatch):
    """Interrupted after the fourth record, it does not read the first three again."""
    write_table(records(8), tmp_path / "table", {"kept": 8})
    table, out, asked = Table(tmp_path / "table"), tmp_path / "shards", []

    def watched(self, index: int) -> Record:
        asked.append(index)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return from_row(self.rows[index])

    monkeypatch.setattr(Table, "__getitem__", watched)
    with pytest.raises(KeyboardInterrupt):
        data.parquet.shard(table, out, 3)
    data.parquet.shard(table, out, 3)
    assert asked == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert read(ShardedTable(out)) == records(8)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="error: .*records.arrow is missing"):
        data.parquet.main(tmp_path, out)
