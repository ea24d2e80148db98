"""Files and folders are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pixelllm.files import write_text, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    target = tmp_path / "out" / "page.html"
    with written_whole(target) as beside:
        beside.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(target) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert names(target.parent) == ["page.html"]
    assert target.read_text() == "old"


def test_a_folder_takes_the_place_of_the_old_when_it_is_complete(tmp_path: Path):
    for name in ("first", "second"):
        with written_whole(tmp_path / "table") as beside:
            beside.mkdir()
            (beside / name).touch()
    with pytest.raises(RuntimeError), written_whole(tmp_path / "table") as beside:
        beside.mkdir()
        raise RuntimeError
    assert names(tmp_path) == ["table"] and names(tmp_path / "table") == ["second"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path):
    (tmp_path / "table.partial").mkdir()
    (tmp_path / "table.partial" / "half").touch()
    with written_whole(tmp_path / "table") as beside:
        beside.mkdir()
    assert names(tmp_path) == ["table"] and not names(tmp_path / "table")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")]
)
def test_a_full_disk_names_the_target(tmp_path: Path, error: Exception):
    with pytest.raises(OSError, match="page could not be written.*No space left"):  # noqa: PT012
        with written_whole(tmp_path / "page") as beside:
            beside.write_bytes(b"half")
            raise error
    assert not names(tmp_path)


def test_other_errors_stay_as_they_are(tmp_path: Path):
    """Catches a missing image reported as a table that could not be written."""
    with pytest.raises(FileNotFoundError, match="^no image$"), written_whole(tmp_path / "table"):
        raise FileNotFoundError("no image")
    with pytest.raises(FileNotFoundError, match="absent.jpg"), written_whole(tmp_path / "table"):
        (tmp_path / "absent.jpg").read_bytes()


def test_text_is_written_whole_or_not_at_all(tmp_path: Path):
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "new \ud800")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"
