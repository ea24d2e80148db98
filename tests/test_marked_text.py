"""Marks in text: written, read back, and refused where they do not match."""

from __future__ import annotations

import pytest

from pixelllm.marked_text import (
    MARKERS,
    Marked,
    Mention,
    cut_unfinished,
    mark_caption,
    mark_objects,
    parse_marked,
)
from pixelllm.records import Piece

ONE, OTHER, THIRD = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.9, 0.8), (0.0, 0.0, 1.0, 1.0)
CAPTION = "Two cars, near a red tree."
PIECES = (
    Piece(15, 25, None, THIRD),
    Piece(0, 8, None, ONE),
    Piece(10, 14),  # points nowhere
    Piece(0, 8, None, OTHER),
)
MARKED = (
    "<obj_text_s>Two cars<obj_text_e><obj_vis_s><vis>;<vis><obj_vis_e>, near"
    "<obj_text_s> a red tree<obj_text_e><obj_vis_s><vis><obj_vis_e>."
)


def test_phrases_are_marked_in_reading_order_with_a_box_for_every_vis():
    assert mark_caption(CAPTION, PIECES) == (MARKED, [ONE, OTHER, THIRD])
    assert mark_caption(CAPTION, ()) == (CAPTION, [])


def test_a_text_without_its_marks_is_the_text():
    for caption in (CAPTION, "a  b", " a b "):
        marked, boxes = mark_caption(caption, (Piece(1, 3, None, ONE),))
        assert parse_marked(marked, len(boxes)).text == caption
        for mark in (*MARKERS, ";"):
            marked = marked.replace(mark, "")
        assert marked == caption


def test_marks_are_read_back_with_their_characters():
    found = parse_marked(MARKED, 3)
    assert found == Marked(CAPTION, (Mention(0, 8, (0, 1)), Mention(15, 25, (2,))))
    assert [CAPTION[m.start : m.end] for m in found.mentions] == ["Two cars", "a red tree"]


def test_objects_without_a_phrase_and_phrases_without_objects_are_read():
    text = f"Answer:{mark_objects(1)} and{mark_objects(2)}, no<obj_text_s> dog<obj_text_e>."
    found = parse_marked(text, 3)
    assert found.text == "Answer: and, no dog."
    assert found.mentions == (Mention(7, 7, (0,)), Mention(11, 11, (1, 2)), Mention(16, 19, ()))


def test_objects_belong_to_the_phrase_right_before_them():
    """Catches objects that a phrase at some distance takes."""
    text = f"<obj_text_s>a car<obj_text_e> at{mark_objects(1)}"
    assert parse_marked(text, 1).mentions == (Mention(0, 5, ()), Mention(8, 8, (0,)))
    twice = f"<obj_text_s>a car<obj_text_e>{mark_objects(1)}{mark_objects(1)}"
    assert [m.objects for m in parse_marked(twice, 2).mentions] == [(0,), (1,)]


def test_blanks_that_a_tokenizer_puts_after_marks_are_taken_back():
    spaced = MARKED.replace("<obj_vis_e>", "<obj_vis_e> ").replace("<obj_vis_e>  ", "<obj_vis_e> ")
    assert parse_marked(spaced, 3).text == CAPTION


@pytest.mark.parametrize(
    ("text", "num_objects", "message"),
    [
        (MARKED, 2, "3 <vis> for 2 boxes or masks"),
        (MARKED, 4, "3 <vis> for 4 boxes or masks"),
        ("a<obj_text_e> b", 0, "<obj_text_e> at character 1 is unmatched"),
        ("<obj_text_s> a<obj_text_s> b", 0, "<obj_text_s> at character 14 is unmatched"),
        ("<obj_vis_s><vis>", 1, "<obj_vis_s> without <obj_vis_e>; was it cut off"),
        ("<obj_text_s> a<obj_vis_e>", 0, "<obj_vis_e> at character 14 is unmatched"),
        ("a <vis>", 1, "<vis> at character 2 is unmatched"),
        ("<obj_text_s> a<vis><obj_text_e>", 1, "<vis> at character 14 is unmatched"),
    ],
)
def test_marks_that_do_not_match_are_refused(text: str, num_objects: int, message: str):
    with pytest.raises(ValueError, match=message):
        parse_marked(text, num_objects)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a<obj_text_s> red", "a"),
        ("a<obj_text_s> b<obj_text_e><obj_vis_s><vis>;", "a<obj_text_s> b<obj_text_e>"),
        (f"{MARKED} An<obj_vis_s><vis>", f"{MARKED} An"),
        (MARKED, MARKED),
        ("plain", "plain"),
    ],
)
def test_a_text_that_was_broken_off_can_be_read(text: str, kept: str):
    assert cut_unfinished(text) == kept
    parse_marked(kept, kept.count("<vis>"))


@pytest.mark.parametrize("pieces", [((0, 8), (4, 12)), ((20, 40),), ((3, 3),)])
def test_phrases_that_overlap_or_leave_the_text_are_refused(pieces):
    with pytest.raises(ValueError, match="outside the text or overlaps another: 'Two cars"):
        mark_caption(CAPTION, [Piece(start, end, None, ONE) for start, end in pieces])
