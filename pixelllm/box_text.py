"""Boxes as text: what `<vis>` is measured against (PerceptionGPT, section 4).

Numbers, as Shikra writes them: `[0.125,0.250,0.500,0.750]`, thousandths of the padded square.
Location tokens, as Kosmos-2 has them: `<patch_index_0132><patch_index_0560>`, the cells of the
upper left and the lower right corner in a grid of 32 x 32, row by row. Either stands where
`<vis>` would, in questions and answers alike, and a box has no embedding and no mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from pixelllm.conversations import Conversation
from pixelllm.marked_text import VIS
from pixelllm.perception_config import BoxForm
from pixelllm.records import Box
from pixelllm.squares import square_boxes

BINS = 32  # of a side
LOCATIONS = tuple(f"<patch_index_{cell:04d}>" for cell in range(BINS**2))
_NUMBER = r"\s*([01]\s*\.\s*[\d\s]+?|[01])\s*"
_PATTERNS = {
    "numbers": re.compile(rf"\[{','.join([_NUMBER] * 4)}\]"),
    "tokens": re.compile(r"<patch_index_(\d{4})>\s*<patch_index_(\d{4})>"),
}


def spell(conversation: Conversation, form: BoxForm) -> Conversation:
    """The conversation with its boxes in words, or as it is for "vis"."""
    if form == "vis":
        return conversation
    boxes = torch.tensor([found.box for found in conversation.objects]).reshape(-1, 4)
    boxes = square_boxes(boxes, conversation.size).tolist()
    spelled = iter([spell_box(box, form) for box in boxes])
    rounds = [tuple(_fill(text, spelled) for text in spoken) for spoken in conversation.rounds]
    return replace(conversation, rounds=tuple(rounds), objects=())


def _fill(text: str, spelled: Iterator[str]) -> str:
    return re.sub(VIS, lambda _: next(spelled), text)


def spell_box(box: Box, form: BoxForm) -> str:
    """A box, xyxy in [0, 1] of the padded square."""
    if form == "numbers":
        return f"[{','.join(f'{value:.3f}' for value in box)}]"
    x0, y0, x1, y1 = (min(int(value * BINS), BINS - 1) for value in box)
    return LOCATIONS[y0 * BINS + x0] + LOCATIONS[y1 * BINS + x1]


def read_boxes(text: str, form: BoxForm) -> tuple[str, list[Box]]:
    """A text with `<vis>` where it spells boxes, and these: the inverse of `spell_box`.

    Corners given as cells are taken at their centres. What is nearly a box stays text.
    """
    boxes: list[Box] = []

    def read(found: re.Match[str]) -> str:
        if form == "numbers":
            values = [float("".join(number.split())) for number in found.groups()]
        else:
            cells = [divmod(int(cell) % BINS**2, BINS) for cell in found.groups()]
            values = [(place + 0.5) / BINS for y, x in cells for place in (x, y)]
        boxes.append(tuple(values))
        return VIS

    return _PATTERNS[form].sub(read, text), boxes
