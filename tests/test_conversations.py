"""Conversations: what is asked and answered about records of every task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pixelllm import templates
from pixelllm.batches import Prompted, fill
from pixelllm.conversations import Conversation, Referent, converse
from pixelllm.marked_text import VIS, parse_marked
from pixelllm.records import Phrase, Piece, Record

BOX, MASK = (0.1, 0.2, 0.3, 0.4), {"size": [4, 6], "counts": "0"}
REFERRING = Phrase("referring/1", "referring", "the car", "the car", target_box=BOX, mask=MASK)
REGION = Phrase("region/2", "region", "a red car", prompt_box=BOX, target_box=BOX, mask=MASK)
GROUNDED = Phrase("grounded/3", "grounded", "A car.", pieces=(Piece(0, 5, None, BOX),))
CAPTION = Phrase("caption/4", "caption", "A car on sand.")
QUESTION = Phrase("question/5", "question", "red", "What color is it?")
POINTED = replace(GROUNDED, id="pointed/6", task="pointed", context="What is it?")
BY_TASK = [
    (POINTED, templates.POINT),
    (REFERRING, (*templates.LOCATE, *templates.SEGMENT)),
    (REGION, templates.DESCRIBE),
    (GROUNDED, templates.GROUND),
    (CAPTION, (*templates.CAPTION, *templates.NARRATE)),
    (QUESTION, (*templates.SHORT_ANSWER, *templates.CONVERSE)),
]


def prompted(*pairs: tuple[Phrase, str]) -> Prompted:
    phrases = tuple(phrase for phrase, _ in pairs)
    record = Record("train/1", (4, 6), phrases, path="1.jpg")
    return Prompted(record, phrases, tuple(fill(text, phrase) for phrase, text in pairs))


@pytest.mark.parametrize(("phrase", "wordings"), BY_TASK)
def test_every_wording_shows_one_image_and_has_an_object_for_every_vis(phrase, wordings):
    for template in wordings:
        (talk,) = converse(prompted((phrase, template)))
        ((question, answer),) = talk.rounds
        assert question.count("<image>") == 1 and phrase.context in question
        assert "{" not in question and answer and talk.size == (4, 6)
        assert (question + answer).count(VIS) == len(talk.objects)
        parse_marked(question, question.count(VIS))
        assert talk.id == phrase.id


def test_wordings_are_several_and_none_twice():
    for _, wordings in BY_TASK:
        assert len(set(wordings)) == len(wordings) >= 6


def test_referring_is_answered_with_box_and_mask():
    (talk,) = converse(prompted((REFERRING, templates.LOCATE[0])))
    assert talk.rounds == (
        (
            "<image> Where is<obj_text_s> the car<obj_text_e>?",
            "Answer:<obj_vis_s><vis><obj_vis_e>.",
        ),
    )
    assert talk.objects == (Referent(BOX, MASK),)


def test_a_region_is_asked_about_by_its_object():
    (talk,) = converse(prompted((REGION, templates.DESCRIBE[0])))
    assert talk.rounds == (("<image> Describe<obj_vis_s><vis><obj_vis_e>.", "a red car"),)
    assert talk.objects == (Referent(BOX, MASK),)


def test_objects_of_the_question_come_before_those_of_the_answer():
    """A mask is asked for by a box (reference, section 5.4)."""
    other = replace(REFERRING, prompt_box=(0.0, 0.0, 1.0, 1.0), mask=None)
    (talk,) = converse(prompted((other, "<image> Segment<obj_vis_s><vis><obj_vis_e>.")))
    assert [found.box for found in talk.objects] == [(0.0, 0.0, 1.0, 1.0), BOX]


def test_a_grounded_caption_marks_its_phrases():
    (talk,) = converse(prompted((GROUNDED, templates.GROUND[0])))
    assert talk.rounds[0][1] == "<obj_text_s>A car<obj_text_e><obj_vis_s><vis><obj_vis_e>."
    assert talk.objects == (Referent(BOX),)


def test_several_phrases_are_conversations_that_all_begin_with_the_image():
    pairs = ((QUESTION, templates.CONVERSE[1]), (REGION, templates.DESCRIBE[1]))
    asked, described = converse(prompted(*pairs))
    assert asked.rounds == (("<image> What color is it?", "red"),)
    assert described.rounds == (("<image> What is<obj_vis_s><vis><obj_vis_e>?", "a red car"),)
    assert asked.objects == () and [found.box for found in described.objects] == [BOX]
    assert (asked.id, described.id) == ("question/5", "region/2")
    (alone,) = converse(prompted(pairs[0]))
    assert alone.rounds[0][0] == "What color is it? <image>"


def test_phrases_in_turn_are_rounds_behind_one_image():
    pairs = [(QUESTION, "{} <image>"), (REGION, templates.DESCRIBE[1]), (REFERRING, "<image> {}?")]
    (talk,) = converse(prompted(*pairs), in_turn=True)
    assert talk.rounds == (
        ("<image> What color is it?", "red"),
        ("What is<obj_vis_s><vis><obj_vis_e>?", "a red car"),
        ("the car?", "Answer:<obj_vis_s><vis><obj_vis_e>."),
    )
    assert talk.objects == (Referent(BOX, MASK), Referent(BOX, MASK)) and talk.id == "question/5"


def test_without_its_last_answer_a_conversation_keeps_what_was_said_before():
    objects = (Referent(BOX), Referent(BOX, MASK), Referent((0.0, 0.0, 1.0, 1.0)))
    rounds = (("<image> Find it.", "Answer:<vis>."), ("What is<vis>?", "a car beside<vis>"))
    asked = Conversation("talk/1", (4, 6), rounds, objects).unanswered()
    assert asked.rounds == (rounds[0], ("What is<vis>?", ""))
    assert asked.objects == objects[:2]


@pytest.mark.parametrize(
    ("phrase", "template", "message"),
    [
        (CAPTION, templates.DESCRIBE[0], "caption/4: .*asks about a box, but the phrase has none"),
        (replace(REFERRING, target_box=None), "Where?", "referring/1: .*no target_box"),
        (
            replace(REFERRING, mask={"size": [6, 4], "counts": "0"}),
            "Where?",
            r"referring/1: its mask is \[6, 4\], but the image is \(H, W\) \(4, 6\)",
        ),
        (replace(GROUNDED, pieces=(Piece(9, 12, None, BOX),)), "Caption.", "grounded/3: .*outside"),
    ],
)
def test_what_does_not_fit_is_named(phrase: Phrase, template: str, message: str):
    with pytest.raises(ValueError, match=message):
        converse(prompted((phrase, template)))
