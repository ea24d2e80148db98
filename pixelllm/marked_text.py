"""Text with PerceptionGPT's marks: where a phrase begins and ends, and where its objects stand.

Reference of PerceptionGPT, section 2.1. A phrase and its objects read
`<obj_text_s> two cars<obj_text_e><obj_vis_s><vis>;<vis><obj_vis_e>`: one `<vis>` an object. The
mark that opens a phrase stands before the blank in front of it, so that a text without its marks
is the text itself, and tokenizers find words the way they know them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from pixelllm.markers import MARKERS
from pixelllm.records import Box, Piece

VIS, VIS_START, VIS_END, TEXT_START, TEXT_END, PATCH, IMAGE_START, IMAGE_END = MARKERS
CLOSING = {TEXT_START: TEXT_END, VIS_START: VIS_END}
_MARK = re.compile("|".join((VIS, VIS_START, VIS_END, TEXT_START, TEXT_END)))
# Tokenizers that know words by the blank before them begin what follows a mark with one.
_STRAY_BLANK = re.compile(r"^ (?=[.,;:?!])")


def mark_objects(count: int) -> str:
    """The marks of so many objects of one phrase."""
    return VIS_START + ";".join([VIS] * count) + VIS_END


def mark_caption(caption: str, pieces: Sequence[Piece]) -> tuple[str, list[Box]]:
    """The caption with its phrases marked, and a box for every `<vis>`.

    Pieces of the same characters are the objects of one phrase; those without a box are left out.
    Raises ValueError where phrases overlap.
    """
    objects: dict[tuple[int, int], list[Box]] = defaultdict(list)
    for piece in pieces:
        if piece.box is not None:
            objects[piece.start, piece.end].append(piece.box)
    parts, boxes, position = [], [], 0
    for (start, end), found in sorted(objects.items()):
        if not position <= start < end <= len(caption):
            place = f"the phrase from {start} to {end}"
            raise ValueError(f"{place} is outside the text or overlaps another: {caption!r}")
        opens = start - (start > position and caption[start - 1] == " ")
        parts += [caption[position:opens], TEXT_START, caption[opens:end], TEXT_END]
        parts.append(mark_objects(len(found)))
        boxes += found
        position = end
    return "".join([*parts, caption[position:]]), boxes


class Mention(NamedTuple):
    """A phrase of a text and the objects it means.

    Args:
        start, end: characters of the text without marks, half open; equal where objects have no
            phrase.
        objects: numbers of their `<vis>` in the text.
    """

    start: int
    end: int
    objects: tuple[int, ...]


class Marked(NamedTuple):
    """A text without its marks, and what they said."""

    text: str
    mentions: tuple[Mention, ...]


def cut_unfinished(text: str) -> str:
    """A text that was broken off, without the phrase or objects it broke off in."""
    opened = max(text.rfind(mark) for mark in CLOSING)
    if opened < 0 or CLOSING[_MARK.match(text, opened)[0]] in text[opened:]:
        return text
    return text[:opened]


def parse_marked(text: str, num_objects: int) -> Marked:
    """Read the marks of a text: the inverse of `mark_caption`.

    Objects belong to the phrase right before them. Raises ValueError on unmatched marks and
    where the text does not have `num_objects` `<vis>`.
    """
    if text.count(VIS) != num_objects:
        counts = f"{text.count(VIS)} {VIS} for {num_objects} boxes or masks"
        raise ValueError(f"{counts}, every one needs its own: {text!r}")
    mentions: list[Mention] = []
    plain, opened, count, position = "", None, 0, 0
    for mark in _MARK.finditer(text):
        if opened != VIS_START:  # what separates objects is no text
            plain += _STRAY_BLANK.sub("", text[position : mark.start()])
        position = mark.end()
        if opened is None and mark[0] in CLOSING:
            opened = mark[0]
            if opened == TEXT_START or not _awaits_objects(mentions, plain):
                mentions.append(Mention(len(plain), len(plain), ()))
        elif opened == VIS_START and mark[0] == VIS:
            mentions[-1] = mentions[-1]._replace(objects=(*mentions[-1].objects, count))
            count += 1
        elif opened is not None and mark[0] == CLOSING[opened]:
            if opened == TEXT_START:  # without the blank in front of the phrase
                start = len(plain) - len(plain[mentions[-1].start :].lstrip())
                mentions[-1] = Mention(start, len(plain), ())
            opened = None
        else:
            raise ValueError(f"{mark[0]} at character {mark.start()} is unmatched: {text!r}")
    if opened is not None:
        raise ValueError(f"{opened} without {CLOSING[opened]}; was it cut off? {text!r}")
    return Marked(plain + _STRAY_BLANK.sub("", text[position:]), tuple(mentions))


def _awaits_objects(mentions: list[Mention], plain: str) -> bool:
    """Whether the text so far ends in a phrase without objects."""
    return bool(mentions) and not mentions[-1].objects and mentions[-1].end == len(plain)
