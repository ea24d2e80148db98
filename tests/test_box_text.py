"""Boxes in words: what is spelled is read again, at the precision of the form."""

from __future__ import annotations

import pytest
import torch

from pixelllm.box_text import BINS, LOCATIONS, read_boxes, spell, spell_box
from pixelllm.conversations import Conversation, Referent
from pixelllm.marked_text import VIS, mark_objects
from pixelllm.tokenizer import train_tokenizer

FORMS = {"numbers": 5e-4, "tokens": 0.5 / BINS}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_come_back_at_the_precision_of_their_form(form, generator: torch.Generator):
    boxes = torch.rand(200, 4, generator=generator)
    text = "; ".join(spell_box(box, form) for box in boxes.tolist())
    plain, found = read_boxes(text, form)
    assert plain == "; ".join([VIS] * 200)
    assert (torch.tensor(found) - boxes).abs().max() <= FORMS[form] + 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_the_border_of_the_square_is_inside(form):
    _, ((x0, y0, x1, y1),) = read_boxes(spell_box((0.0, 0.0, 1.0, 1.0), form), form)
    assert 0 <= x0 == y0 < 0.02 and 0.98 < x1 == y1 <= 1


def test_the_published_forms():
    box = (0.125, 0.25, 0.5, 0.75)
    assert spell_box(box, "numbers") == "[0.125,0.250,0.500,0.750]"
    assert spell_box(box, "tokens") == "<patch_index_0260><patch_index_0784>"
    assert len(LOCATIONS) == 1024


def test_blanks_that_a_tokenizer_leaves_between_digits_do_not_count():
    tokenizer = train_tokenizer(["a red car"] * 3, 200)
    ids = tokenizer("Answer:" + spell_box((0.1, 0.2, 0.3, 1.0), "numbers") + ".").input_ids
    text, boxes = read_boxes(tokenizer.decode(ids), "numbers")
    assert boxes == [(0.1, 0.2, 0.3, 1.0)]
    assert text == f"Answer:{VIS}."


@pytest.mark.parametrize("text", ["[0.1,0.2,0.3]", "[0.1,0.2,0.3,0.4,0.5]", "[7.1,0.2,0.3,0.4]"])
def test_what_is_nearly_a_box_stays_text(text):
    assert read_boxes(text, "numbers") == (text, [])


def test_questions_and_answers_are_spelled_in_reading_order():
    """On the padded square: of an image twice as wide as high, y moves towards the middle."""
    box, other = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)
    rounds = (("what is " + mark_objects(1), "a car"), ("and below?", "at " + mark_objects(1)))
    talk = Conversation("t", (50, 100), rounds, (Referent(box), Referent(other)))
    spelled = spell(talk, "numbers")
    assert spelled.objects == ()
    assert spelled.rounds[0][0] == f"what is {mark_objects(1)}".replace(
        VIS, "[0.000,0.250,0.500,0.750]"
    )
    assert "[0.500,0.250,1.000,0.500]" in spelled.rounds[1][1]
    assert spell(talk, "vis") is talk
