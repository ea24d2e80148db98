"""How records become tensors: images to a padded frame, phrases to token ids with places.

Images of a batch share K phrases; missing ones are padding rows. Captions begin with the
trunk's begin token and end with its end token (reference, section 4.4: an overlong caption
loses its end).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pixelllm.alignment import token_boxes
from pixelllm.config import Source
from pixelllm.models.pixelllm import Text
from pixelllm.records import Box, Phrase, Record
from pixelllm.views import whole_view

WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)
TENSORS = ("images", "sizes", "boxes", "row_padding", "points", "with_points", "masks")


@dataclass(frozen=True)
class Batch:
    """Everything a training step or a teacher-forced evaluation needs.

    Args:
        images: uint8[B, 3, S, S], zero padded bottom and right; empty where all frozen
            features come from a cache and nothing else reads the pixels.
        sizes: int64[B, 2], (H, W) of the image inside the frame.
        features: cached outputs of frozen encoders by encoder name, float16[B, C, h, w].
        boxes: float32[B, K, 4], location prompts; K is 1 where the rows of an image share theirs.
        text: rows are B * K, prompts of an image adjacent.
        row_padding: bool[R], True where an image has fewer than K phrases.
        points: float32[R, T, 2, 2], top-left and bottom-right corner of each token's place.
        with_points: bool[R, T], tokens that have a place.
        masks: bool[B, K, S, S], of the phrases in the frame; empty where the source has no mask
            loss.
        source: where the batch comes from, with its loss weights.
        ids: phrase ids of the rows, "" on padding.
    """

    images: Tensor
    sizes: Tensor
    features: dict[str, Tensor]
    boxes: Tensor
    text: Text
    row_padding: Tensor
    points: Tensor
    with_points: Tensor
    masks: Tensor
    source: Source
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_prompts(self) -> int:
        """K, rows per image."""
        return len(self.row_padding) // len(self)

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            text=Text(*(tensor.to(device) for tensor in self.text)),
            features={name: value.to(device) for name, value in self.features.items()},
            **{name: getattr(self, name).to(device) for name in TENSORS},
        )

    def with_prompts(self, boxes: Tensor, phrase: Tensor, is_phrase: Tensor) -> Batch:
        """The batch asked at other boxes.

        Args:
            boxes: float32[B, M, 4], the new prompts.
            phrase: int64[B, M], index among the K phrases of the image of what to write there.
            is_phrase: bool[B, M], False where there is nothing to write.
        """
        rows = phrase + torch.arange(len(self), device=phrase.device)[:, None] * self.num_prompts
        rows = rows.flatten()
        ids = [self.ids[row] for row in rows.tolist()]
        return replace(
            self,
            boxes=boxes,
            text=Text(*(tensor[rows] for tensor in self.text)),
            row_padding=self.row_padding[rows] | ~is_phrase.flatten(),
            points=self.points[rows],
            with_points=self.with_points[rows],
            masks=self.masks.new_empty(0),
            ids=tuple(ids),
        )


@dataclass(frozen=True)
class TextLimits:
    """How many tokens a row may have, and the begin token of the trunk."""

    begin_id: int
    max_tokens: int
    max_context: int


@dataclass(frozen=True)
class Prompted:
    """One image of a batch with the phrases and contexts chosen for it."""

    record: Record
    phrases: tuple[Phrase, ...]
    contexts: tuple[str, ...]


def frame_images(records: Sequence[Record], frame: int) -> tuple[Tensor, Tensor]:
    """Decode and pad the images: uint8[B, 3, frame, frame] and their sizes int64[B, 2]."""
    views = [whole_view(record, frame) for record in records]
    return torch.stack([view.image for view in views]), torch.tensor([v.size for v in views])


def fill(template: str, phrase: Phrase) -> str:
    """The context text of a phrase: "{}" in the template is the phrase's own context."""
    return template.replace("{}", phrase.context)


def encode_context(
    contexts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_context: int
) -> tuple[Tensor, Tensor]:
    """Context ids int64[R, C] ending with the end token, and their padding bool[R, C]."""
    rows = [
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id][:max_context]
        if text
        else []
        for text in contexts
    ]
    return pad_rows(rows, tokenizer.pad_token_id)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths: ids int64[R, L] and padding bool[R, L]."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    padding = torch.ones((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        padding[index, : len(row)] = False
    return ids, padding


def encode_caption(
    phrase: Phrase,
    tokenizer: PreTrainedTokenizerFast,
    limits: TextLimits,
    every_word: bool = False,
) -> tuple[list[int], np.ndarray]:
    """Token ids from begin to end token and float32[T, 4] boxes, NaN where a token has none.

    An expression says what it means with its last word (reference, section 5.5), or with
    `every_word`: in training its context has told the model already what will be said.
    """
    encoded = tokenizer(phrase.caption, add_special_tokens=False, return_offsets_mapping=True)
    ids = [limits.begin_id, *encoded.input_ids, tokenizer.eos_token_id][: limits.max_tokens]
    offsets = [(-1, -1), *encoded.offset_mapping, (-1, -1)][: limits.max_tokens]
    if phrase.pieces:
        return ids, token_boxes(phrase.pieces, offsets)
    boxes = np.full((len(ids), 4), np.nan, dtype=np.float32)
    words = [place for place, (start, _) in enumerate(offsets) if start >= 0]
    if phrase.target_box is not None:
        last_alone = phrase.task == "referring" and not every_word
        boxes[words[-1:] if last_alone else words] = phrase.target_box
    return ids, boxes


def collate_text(
    chosen: Sequence[Prompted],
    tokenizer: PreTrainedTokenizerFast,
    limits: TextLimits,
    every_word: bool = False,
) -> dict[str, object]:
    """Everything of a `Batch` that comes from the phrases; `every_word` as in `Source`."""
    num_prompts = max(1, *(len(item.phrases) for item in chosen))
    contexts, tokens, places, boxes, ids = [], [], [], [], []
    for item in chosen:
        missing = num_prompts - len(item.phrases)
        encoded = [encode_caption(p, tokenizer, limits, every_word) for p in item.phrases]
        # A padding row keeps its begin token: a row without any valid token has no softmax.
        tokens += [row for row, _ in encoded] + [[limits.begin_id]] * missing
        places += [place for _, place in encoded] + [np.zeros((0, 4), np.float32)] * missing
        contexts += [*item.contexts, *[""] * missing]
        boxes += [phrase.prompt_box or WHOLE_IMAGE for phrase in item.phrases]
        boxes += [WHOLE_IMAGE] * missing
        ids += [*(phrase.id for phrase in item.phrases), *[""] * missing]
    token_ids, token_padding = pad_rows(tokens, tokenizer.pad_token_id)
    text = Text(*encode_context(contexts, tokenizer, limits.max_context), token_ids, token_padding)
    points = np.full((*token_ids.shape, 4), np.nan, dtype=np.float32)
    for row, place in enumerate(places):
        points[row, : len(place)] = place
    with_points = ~np.isnan(points).any(-1)
    prompts = torch.tensor(boxes, dtype=torch.float32).view(len(chosen), num_prompts, 4)
    if all(phrase.prompt_box is None for item in chosen for phrase in item.phrases):
        prompts = prompts[:, :1]  # the visual tokens of the whole image, computed once
    return {
        "boxes": prompts,
        "text": text,
        "row_padding": torch.tensor([not name for name in ids]),
        "points": torch.from_numpy(np.nan_to_num(points)).view(*token_ids.shape, 2, 2),
        "with_points": torch.from_numpy(with_points),
        "ids": tuple(ids),
    }
