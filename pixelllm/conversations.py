"""Records as conversations: questions and answers with marks, and an object for every `<vis>`.

Reference of PerceptionGPT, sections 1.5 and 5.2. A phrase is one round: its context, a template
already filled in (`pixelllm.templates`), is what the user says, and its task decides the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from pixelllm.batches import Prompted
from pixelllm.marked_text import VIS, mark_caption
from pixelllm.records import Box, Phrase
from pixelllm.templates import ANSWER, IMAGE


class Referent(NamedTuple):
    """The object of one `<vis>`.

    Args:
        box: xyxy in [0, 1] of the original image.
        mask: COCO run-length encoding at the original size, where it is known.
    """

    box: Box
    mask: dict[str, Any] | None = None


@dataclass(frozen=True)
class Conversation:
    """What is said about one image.

    Args:
        id: of the phrases, in errors and predictions.
        size: (H, W) of the original image.
        rounds: (user's text, assistant's text); one `<image>` in all of the user's texts. The
            last answer may be "": the model is to write it.
        objects: one for every `<vis>`, in reading order.
    """

    id: str
    size: tuple[int, int]
    rounds: tuple[tuple[str, str], ...]
    objects: tuple[Referent, ...]

    def unanswered(self) -> Conversation:
        """The same without the last answer and its objects."""
        question, answer = self.rounds[-1]
        kept = len(self.objects) - answer.count(VIS)
        rounds = (*self.rounds[:-1], (question, ""))
        return replace(self, rounds=rounds, objects=self.objects[:kept])


def converse(item: Prompted, segment: bool = True, in_turn: bool = False) -> list[Conversation]:
    """A conversation about each of the chosen phrases of a record.

    Where there are several, all begin with the image, which they can share (`chats.share_image`).

    Args:
        segment: answer with the masks of objects, where they are known, beside their boxes.
        in_turn: one conversation instead, the phrases being its rounds.

    Raises ValueError naming the phrase where a question or an answer needs a box it lacks, or
    its mask is of another size than the image.
    """
    size, found = item.record.size, []
    for phrase, question in zip(item.phrases, item.contexts, strict=True):
        if len(item.phrases) > 1:
            question = f"{IMAGE} {question.replace(IMAGE, '').strip()}"
        if phrase.mask is not None and tuple(phrase.mask["size"]) != size:
            sizes = f"{phrase.mask['size']}, but the image is (H, W) {size}"
            raise ValueError(f"{phrase.id}: its mask is {sizes}; was one of them resized?")
        answer, answered = _answer(phrase, segment)
        objects = (*_asked_about(phrase, question), *answered)
        found.append(Conversation(phrase.id, size, ((question, answer),), objects))
    return [join(found)] if in_turn else found


def join(rounds: Sequence[Conversation]) -> Conversation:
    """Conversations about one image as one, which shows the image where the first does."""
    first, *others = rounds
    later = [
        (question.replace(IMAGE, "").strip(), answer)
        for talk in others
        for question, answer in talk.rounds
    ]
    objects = tuple(chain.from_iterable(talk.objects for talk in rounds))
    return Conversation(first.id, first.size, (*first.rounds, *later), objects)


def _asked_about(phrase: Phrase, question: str) -> list[Referent]:
    if VIS not in question:
        return []
    if phrase.prompt_box is None:
        raise ValueError(f"{phrase.id}: {question!r} asks about a box, but the phrase has none")
    return [Referent(phrase.prompt_box, phrase.mask)]


def _answer(phrase: Phrase, segment: bool) -> tuple[str, list[Referent]]:
    """What the assistant says, with the objects in it."""
    if phrase.task == "referring":
        if phrase.target_box is None:
            raise ValueError(f"{phrase.id}: a referring phrase has no target_box to answer with")
        return ANSWER, [Referent(phrase.target_box, phrase.mask if segment else None)]
    if phrase.task in ("grounded", "pointed"):
        try:
            marked, boxes = mark_caption(phrase.caption, phrase.pieces)
        except ValueError as error:
            raise ValueError(f"{phrase.id}: {error}") from error
        return marked, [Referent(box) for box in boxes]
    return phrase.caption, []
