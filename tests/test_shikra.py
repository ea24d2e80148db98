"""Shikra-RD to tables: questions, answers whose phrases have boxes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.shikra import convert, main, parse_marked
from pixelllm.batches import Prompted
from pixelllm.conversations import converse
from pixelllm.marked_text import parse_marked as read_marks
from pixelllm.tables import Table

BOXES = [[10, 20, 60, 70], [0, 0, 100, 80], [50, 10, 90, 40]]


def entry(**changes: Any) -> dict[str, Any]:
    told = "<ph_st> The two dogs <ph_ed> run behind <ph_st>the ball<ph_ed>. So they play."
    return {
        "img_path": "2216695423.jpg",
        "question": "Why do <ph_st>the dogs<ph_ed>  run?",
        "question_boxes_seq": [[0, 2]],
        "answer": "They play.",
        "cot_with_ans": told,
        "answer_boxes_seq": [[0, 2], [1]],
        "boxes": BOXES,
        **changes,
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "flickr30k-images").mkdir()
    for name in ("2216695423", "1"):
        Image.new("RGB", (100, 80)).save(tmp_path / "flickr30k-images" / f"{name}.jpg")
    return tmp_path


def write(folder: Path, *entries: Any) -> Path:
    file = folder / "rd.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in entries))
    return file


def test_phrases_of_answers_become_pieces_with_their_boxes(tmp_path: Path, images: Path):
    file = write(tmp_path, entry(), entry(img_path="1.jpg"), entry(question="Who?"))
    report = convert([file], images, tmp_path / "table")
    first, second = Table(tmp_path / "table")
    assert (report["images"], report["phrases"], second.id) == (2, 3, "flickr30k-images/1")
    why, who = first.phrases
    assert (why.task, why.context) == ("pointed", "Why do the dogs run?")
    assert why.caption == "The two dogs run behind the ball. So they play."
    assert why.id == "pointed/rd/1" and (who.id, who.context) == ("pointed/rd/3", "Who?")
    said = [why.caption[piece.start : piece.end] for piece in why.pieces]
    assert said == ["The two dogs", "The two dogs", "the ball"]
    assert why.pieces[0].box == pytest.approx((0.1, 0.25, 0.6, 0.875))
    assert why.pieces[1].box == pytest.approx((0.5, 0.125, 0.9, 0.5))


def test_the_answer_is_spoken_with_a_vis_for_every_box(tmp_path: Path, images: Path):
    convert([write(tmp_path, entry())], images, tmp_path / "table")
    (record,) = Table(tmp_path / "table")
    (talk,) = converse(Prompted(record, record.phrases, ("<image> Why?",)))
    ((_, answer),) = talk.rounds
    text, mentions = read_marks(answer, len(talk.objects))
    assert text == record.phrases[0].caption and [m.objects for m in mentions] == [(0, 1), (2,)]
    assert talk.objects[2].box == (0.0, 0.0, 1.0, 1.0)


def test_marks_keep_the_blanks_between_words():
    text, spans = parse_marked("<ph_st>A dog<ph_ed>, <ph_st> a cat<ph_ed>and<ph_st> I<ph_ed>", "x")
    assert text == "A dog, a catand I"
    assert [text[start:end] for start, end in spans] == ["A dog", "a cat", "I"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cot_with_ans": "<ph_st>a dog"}, "<ph_st> without <ph_ed>"),
        ({"cot_with_ans": "a dog<ph_ed>"}, "<ph_ed> is unmatched"),
        ({"answer_boxes_seq": [[0]]}, "2 phrases, but answer_boxes_seq"),
        ({"answer_boxes_seq": [0, 1]}, "2 phrases, but answer_boxes_seq"),
        ({"answer_boxes_seq": [[0], [3]]}, "there is no box 3"),
        ({"boxes": [[1, 2, 3, "4"]] * 3}, r"box 0 is not \[x0, y0, x1, y1\]"),
        ({"boxes": [[1, 2, 3]] * 3}, r"box 0 is not \[x0, y0, x1, y1\]"),
        ({"question": 5}, "the text is not a string"),
        ({"img_path": "none.jpg"}, "no file .*none.jpg"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, images, changes, message):
    file = write(tmp_path, entry(img_path="1.jpg"), entry(**changes))
    with pytest.raises((ValueError, OSError), match=f"rd.jsonl:2: .*{message}"):
        convert([file], images, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_a_broken_line_and_no_line_are_named(tmp_path: Path, images: Path, capsys):
    file = write(tmp_path, entry())
    file.write_text(file.read_text() + "{cut")
    with pytest.raises(SystemExit, match="rd.jsonl:2: not a line of JSON"):
        main((file,), images, tmp_path / "table")
    file.write_text("\n")
    with pytest.raises(SystemExit, match="no question in .*rd.jsonl"):
        main((file,), images, tmp_path / "table")
    with pytest.raises(SystemExit, match="no such annotation file"):
        main((tmp_path / "other.jsonl",), images, tmp_path / "table")
