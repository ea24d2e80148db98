"""Tables of records: what is written comes back, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pixelllm.records import FEATURES, Phrase, Piece, Record, from_row, to_row
from pixelllm.tables import Table, write_table

FULL = Record(
    "coco/1",
    (48, 64),
    (
        Phrase(
            "p1",
            "referring",
            "the réd 🚗",
            context="where is",
            prompt_box=(0.0, 0.125, 0.5, 1.0),
            pieces=(Piece(0, 3), Piece(-1, -1, (0.5, 0.25), (0.0, 0.25, 0.75, 1.0))),
            target_box=(0.25, 0.25, 0.5, 0.5),
            mask={"size": [48, 64], "counts": "abc"},
        ),
        Phrase("p2", "caption", "a"),
    ),
    path="/images/1.jpg",
)
EMBEDDED = Record("coco/2", (1, 1), (Phrase("p3", "caption", "b"),), data=b"\xff\x00jpeg")


def test_rows_are_the_inverse_of_records():
    for record in (FULL, EMBEDDED):
        assert from_row(to_row(record)) == record


def test_a_table_gives_its_records_back(tmp_path: Path):
    """Boxes and points within the 32 bits they are stored with, the rest exactly."""
    assert write_table([FULL, EMBEDDED], tmp_path / "table", {"read": 2}) == 2
    table = Table(tmp_path / "table")
    assert len(table) == 2 and [table[0], table[1]] == [FULL, EMBEDDED]
    assert json.loads((tmp_path / "table" / "report.json").read_text()) == {"read": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_images_come_without_phrases_in_order(tmp_path: Path):
    write_table([FULL, EMBEDDED], tmp_path / "table", {})
    bare = [replace(record, phrases=()) for record in (FULL, EMBEDDED)]
    assert list(Table(tmp_path / "table").images()) == bare


def test_a_failing_source_leaves_the_table_of_before(tmp_path: Path):
    write_table([FULL], tmp_path / "table", {})

    def failing():
        yield EMBEDDED
        raise RuntimeError("bad line")

    with pytest.raises(RuntimeError, match="bad line"):
        write_table(failing(), tmp_path / "table", {})
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
    assert Table(tmp_path / "table")[0] == FULL


def test_a_new_table_replaces_the_old(tmp_path: Path):
    write_table([FULL], tmp_path / "table", {})
    write_table([EMBEDDED], tmp_path / "table", {})
    assert Table(tmp_path / "table")[0] == EMBEDDED


def test_no_record_is_an_error_that_shows_the_report(tmp_path: Path):
    with pytest.raises(ValueError, match=r'no record to write; report: {"dropped": 3}'):
        write_table([], tmp_path / "table", {"dropped": 3})
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_replaced(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileExistsError, match="photos exists and is not a table"):
        write_table([FULL], tmp_path / "photos", {})


def test_a_path_that_is_no_table_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"records.arrow is missing.*python -m data"):
        Table(tmp_path)


def test_an_empty_table_is_named(tmp_path: Path):
    with pa.ipc.new_stream(str(tmp_path / "records.arrow"), FEATURES.arrow_schema):
        pass
    with pytest.raises(ValueError, match="the table holds no record"):
        Table(tmp_path)


def test_a_damaged_table_is_named(tmp_path: Path):
    write_table([FULL], tmp_path / "table", {})
    file = tmp_path / "table" / "records.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="records.arrow is damaged, make the table again"):
        Table(tmp_path / "table")
