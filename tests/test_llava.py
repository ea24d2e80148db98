"""LLaVA's conversations to tables: one phrase a turn, and what is refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.llava import convert, main
from pixelllm.tables import Table

COCO = "coco/train2017/000000033471.jpg"


def entry(image: str | None, *turns: str, **values: Any) -> dict[str, Any]:
    """As in llava_v1_5_mix665k.json: speakers take turns."""
    speakers = ("human", "gpt") * len(turns)
    talk = [{"from": s, "value": t} for s, t in zip(speakers, turns, strict=False)]
    picture = {} if image is None else {"image": image}
    return {"id": "000000033471", **picture, "conversations": talk, **values}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in (COCO, "vg/VG_100K/2.jpg"):
        path = tmp_path / "llava" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    return tmp_path / "llava"


def write(folder: Path, *entries: Any) -> Path:
    file = folder / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(list(entries)))
    return file


def test_every_turn_is_a_phrase_without_the_turns_before(tmp_path: Path, images: Path):
    turns = ("<image>\nWhat colour is it?", "Red.", "Why?\n", " Paint.", "Sure? <image>", "Yes")
    file = write(tmp_path, entry(COCO, *turns), entry("vg/VG_100K/2.jpg", "Hi", "Ho", id=2))
    report = convert([file], images, tmp_path / "table")
    first, second = Table(tmp_path / "table")
    assert (first.id, first.size, second.id) == ("train2017/33471", (6, 8), "VG_100K/2")
    assert first.path == str(images / COCO)
    found = [(phrase.context, phrase.caption) for phrase in first.phrases]
    assert found == [("What colour is it?", "Red."), ("Why?", "Paint."), ("Sure?", "Yes")]
    for phrase in first.phrases:
        assert phrase.task == "question" and phrase.prompt_box is phrase.target_box is None
    assert first.phrases[1].id == "question/llava_v1_5_mix665k/0/1"
    assert (report["read"], report["kept"], report["phrases"]) == (2, 2, 4)
    assert report["files"] == [str(file)]


def test_conversations_of_one_image_have_their_own_ids(tmp_path: Path, images: Path):
    """The files name several conversations after the same image."""
    file = write(tmp_path, entry(COCO, "a", "b"), entry(COCO, "c", "d"))
    convert([file], images, tmp_path / "table")
    ids = {phrase.id for record in Table(tmp_path / "table") for phrase in record.phrases}
    assert len(ids) == 2


def test_what_is_dropped_is_counted(tmp_path: Path, images: Path):
    text_only = entry(None, "Hello", "Hi", "left over")
    file = write(tmp_path, text_only, entry(COCO, "a", " ", "b", "c"), entry(COCO, "a", ""))
    report = convert([file], images, tmp_path / "table")
    expected = {"no image": 1, "empty answer": 2, "image without phrases": 1}
    assert (report["kept"], report["phrases"], report["dropped"]) == (1, 1, expected)


def test_a_missing_image_is_named_or_skipped(tmp_path: Path, images: Path):
    file = write(tmp_path, entry(COCO, "a", "b"), entry("gqa/images/9.jpg", "a", "b"))
    with pytest.raises(FileNotFoundError, match="entry 1: .*gqa/images/9.jpg.*--skip-missing"):
        convert([file], images, tmp_path / "table")
    assert not (tmp_path / "table").exists()
    report = convert([file], images, tmp_path / "table", skip_missing=True)
    assert report["dropped"] == {"missing image": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (entry(COCO, "a"), "entry 0: turns are not human, gpt, human, gpt… but human"),
        (entry(COCO, "a", "b", conversations=5), "entry 0: conversations is not a list"),
        (
            entry(COCO, conversations=[{"from": "human"}]),
            r"entry 0: conversations\[0\] has no value",
        ),
        (entry(COCO, "a", 5), "entry 0: the text is not a string but 5"),
        (entry(5, "a", "b"), "entry 0: the image is not a file name but 5"),
        ({"image": COCO}, r"entry 0\[0\] has no conversations"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, images: Path, content: Any, message: str):
    with pytest.raises(ValueError, match=f"llava_v1_5_mix665k.json: {message}"):
        convert([write(tmp_path, content)], images, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_other_files_are_refused(tmp_path: Path, images: Path):
    file = tmp_path / "instances.json"
    file.write_text('{"images": []}')
    with pytest.raises(ValueError, match="no conversation in .*instances.json"):
        convert([file], images, tmp_path / "table")
    with pytest.raises(SystemExit, match="^error: .*absent.json"):
        main((tmp_path / "absent.json",), images, tmp_path / "table")
