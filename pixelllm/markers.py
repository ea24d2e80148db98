"""The tokens PerceptionGPT adds to a language model (reference, sections 1.4 and 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

# One <vis> stands for one object; the release writes <loc>.
MARKERS = (
    "<vis>", "<obj_vis_s>", "<obj_vis_e>", "<obj_text_s>", "<obj_text_e>",
    "<im_patch>", "<im_start>", "<im_end>",
)  # fmt: skip


class MarkerIds(NamedTuple):
    """Token ids of `MARKERS`, in their order; `image` is that of every visual token."""

    vis: int
    vis_start: int
    vis_end: int
    text_start: int
    text_end: int
    image: int
    image_start: int
    image_end: int


def add_markers(tokenizer: PreTrainedTokenizerBase) -> MarkerIds:
    """Give a tokenizer the markers it lacks, as special tokens."""
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return marker_ids(tokenizer)


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> MarkerIds:
    """The ids of the markers. Raises ValueError where the tokenizer lacks some."""
    known = tokenizer.get_added_vocab()
    missing = [marker for marker in MARKERS if marker not in known]
    if missing:
        remedy = "add them with add_markers and enlarge the trunk's embeddings"
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; {remedy}")
    return MarkerIds(*(known[marker] for marker in MARKERS))


def check_markers(token_ids: Sequence[int], ids: MarkerIds, num_boxes: int, name: str) -> None:
    """Raise ValueError on unmatched markers, and where `<vis>` and boxes differ in number.

    Args:
        num_boxes: boxes, or masks, that go with the tokens.
        name: of the sample, in errors.
    """
    names = dict(zip(ids, MARKERS, strict=True))
    closing = {
        ids.vis_start: ids.vis_end, ids.text_start: ids.text_end, ids.image_start: ids.image_end
    }  # fmt: skip
    opening = {end: start for start, end in closing.items()}
    opened: set[int] = set()
    for place, token in enumerate(token_ids):
        if token in opened:
            again = f"{names[token]} a second time before {names[closing[token]]}"
            raise ValueError(f"{name}: token {place} is {again}")
        if token in closing:
            opened.add(token)
        elif token in opening:
            if opening[token] not in opened:
                alone = f"{names[token]} without {names[opening[token]]}"
                raise ValueError(f"{name}: token {place} is {alone}")
            opened.remove(opening[token])
    for token in opened:
        alone = f"{names[token]} without {names[closing[token]]}"
        raise ValueError(f"{name}: {alone}; was the text cut off?")
    found = sum(token == ids.vis for token in token_ids)
    if found != num_boxes:
        counts = f"{found} <vis> in the text, but {num_boxes} boxes"
        raise ValueError(f"{name}: {counts}; every <vis> needs its own")
