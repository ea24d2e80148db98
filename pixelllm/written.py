"""What a PerceptionGPT wrote, read as text and the objects that it mentions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pixelllm.asked_images import to_location
from pixelllm.box_text import read_boxes
from pixelllm.chats import decode_answer
from pixelllm.conversations import Conversation, Referent
from pixelllm.locating import Location
from pixelllm.marked_text import VIS, Mention, cut_unfinished, parse_marked
from pixelllm.markers import MARKERS, marker_ids
from pixelllm.models.answering import Answers
from pixelllm.perception_config import BoxForm
from pixelllm.templates import IMAGE


@dataclass(frozen=True)
class Answer:
    """A written answer.

    Args:
        text: without marks.
        objects: that it mentions, in order; the score is the probability that one is mentioned
            there at all.
        mentions: the stretches of the text that mean them.
        log_prob: sum over the tokens, the end token included.
        marked: the text with its marks, which match (`pixelllm.marked_text`); without any where
            those that were written do not.
    """

    text: str
    objects: tuple[Location, ...]
    mentions: tuple[Mention, ...]
    log_prob: float
    marked: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values: the text, and per phrase its characters and objects."""
        phrases = [
            {"start": m.start, "end": m.end, "objects": list(m.objects)} for m in self.mentions
        ]
        objects = [found.to_json() for found in self.objects]
        return {
            "answer": self.text, "phrases": phrases, "objects": objects, "log_prob": self.log_prob
        }  # fmt: skip


def read_answer(
    answers: Answers,
    row: int,
    size: tuple[int, int],
    tokenizer: PreTrainedTokenizerFast,
    form: BoxForm,
) -> Answer:
    """One row of the answers, about an image of this size."""
    valid = ~answers.padding[row]
    token_ids, log_probs = answers.token_ids[row][valid], answers.log_probs[row][valid]
    written = cut_unfinished(decode_answer(token_ids.tolist(), tokenizer))
    if form == "vis":
        n = written.count(VIS)
        mine = (answers.row == row).nonzero()[:n, 0]
        boxes, masks = answers.boxes[mine], [None] * n
        if len(answers.masks):
            masks = answers.masks[mine]
        scores = log_probs[token_ids == marker_ids(tokenizer).vis].exp().tolist()[:n]
    else:
        written, spelled = read_boxes(written, form)
        boxes, masks = torch.tensor(spelled), [None] * len(spelled)
        scores = [float(log_probs.mean().exp())] * len(spelled)
    objects = tuple(
        to_location(box, score, mask, size)
        for box, score, mask in zip(boxes, scores, masks, strict=True)
    )
    try:
        text, mentions = parse_marked(written, len(objects))
    except ValueError:  # a model may leave marks unmatched
        text, mentions = without_marks(written), ()
        written = text
    return Answer(text, objects, mentions, float(log_probs.sum()), written)


def without_marks(text: str) -> str:
    for mark in MARKERS:
        text = text.replace(mark, "")
    return text.strip()


def ask_next(talk: Conversation, question: str) -> Conversation:
    """The conversation with a further question, to be answered; the first one shows the image."""
    if talk.rounds:
        question = question.replace(IMAGE, "").strip()
    return Conversation(question, talk.size, (*talk.rounds, (question, "")), talk.objects)


def answer_last(talk: Conversation, answer: Answer) -> Conversation:
    """The conversation with its last question answered so, objects included."""
    (question, _), shown = talk.rounds[-1], answer.objects[: answer.marked.count(VIS)]
    referents = (Referent(found.box, found.mask) for found in shown)
    rounds = (*talk.rounds[:-1], (question, answer.marked))
    return Conversation(talk.id, talk.size, rounds, (*talk.objects, *referents))
