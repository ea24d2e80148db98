"""Batches of images with their objects' boxes, masks and names, for the pretraining stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pixelllm.batches import frame_images
from pixelllm.config import Source
from pixelllm.mixture import NO_IMAGE, source_records
from pixelllm.records import Phrase
from pixelllm.tables import Table
from pixelllm.views import View, see_mask

TASK = "region"
MASK_STRIDE = 4  # SAM's mask decoder answers at a quarter of the frame


@dataclass(frozen=True)
class InstanceBatch:
    """B images with K objects each.

    Args:
        images: uint8[B, 3, S, S]; sizes: int64[B, 2].
        boxes: float32[B, K, 4], xyxy in [0, 1] of the image.
        masks: bool[B, K, S / 4, S / 4], in the padded frame.
        words: float32[B, K, W], 1 where the object's name has the word.
        valid: bool[B, K], False where an image has fewer objects.
        ids: phrase ids.
    """

    images: Tensor
    sizes: Tensor
    boxes: Tensor
    masks: Tensor
    words: Tensor
    valid: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> InstanceBatch:
        values = (getattr(self, field.name) for field in fields(self))
        return InstanceBatch(*(v.to(device) if isinstance(v, Tensor) else v for v in values))


class Instances(Dataset):
    """Random batches of a table of regions with masks, by step number.

    Args:
        objects_per_image: drawn at random; None takes all.
        words: vocabulary of the names, in order.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        words: Sequence[str],
        *,
        frame: int,
        batch_size: int,
        num_steps: int,
        objects_per_image: int | None,
        seed: int,
    ) -> None:
        self.records = source_records(tables, Source(TASK), batch_size, seed)
        self.words = {word: index for index, word in enumerate(words)}
        self.frame = frame
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.objects_per_image = objects_per_image
        self.seed = seed

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> InstanceBatch:
        rng = np.random.default_rng([self.seed, step])
        records = [self.records[step * self.batch_size + i] for i in range(self.batch_size)]
        images, sizes = frame_images(records, self.frame)
        objects = [[p for p in r.phrases if p.task == TASK and p.mask] for r in records]
        chosen = [
            [o[i] for i in rng.permutation(len(o))[: self.objects_per_image]] for o in objects
        ]
        K = max(1, *map(len, chosen))  # regions may come without masks
        side = self.frame // MASK_STRIDE
        boxes = torch.zeros(len(records), K, 4)
        masks = torch.zeros(len(records), K, side, side, dtype=torch.bool)
        words = torch.zeros(len(records), K, len(self.words))
        for b, phrases in enumerate(chosen):
            if not phrases:
                continue
            size = tuple(sizes[b].tolist())
            masks[b, : len(phrases)] = small_masks(phrases, size, self.frame)
            boxes[b, : len(phrases)] = torch.tensor([phrase.target_box for phrase in phrases])
            for k, phrase in enumerate(phrases):
                words[b, k, [self.words[word] for word in phrase.caption.split()]] = 1
        valid = masks.flatten(2).any(2)  # an object thinner than the stride may have no pixel left
        ids = tuple(phrase.id for phrases in chosen for phrase in phrases)
        return InstanceBatch(images, sizes, boxes, masks, words, valid, ids)


def small_masks(phrases: Sequence[Phrase], size: tuple[int, int], frame: int) -> Tensor:
    """Masks in the padded frame at a quarter of its resolution, bool[K, S/4, S/4]."""
    view, half = View(NO_IMAGE, size), MASK_STRIDE // 2
    masks = torch.stack([see_mask(phrase, view, frame) for phrase in phrases])
    return masks[:, half::MASK_STRIDE, half::MASK_STRIDE]


def words_of_regions(tables: Sequence[Table]) -> list[str]:
    """The sorted vocabulary of the regions' names."""
    words: set[str] = set()
    for table in tables:
        for chunk in table.rows.data.column("phrases").chunks:
            phrases = chunk.flatten()
            is_region = pc.equal(phrases.field("task"), TASK)
            for name in phrases.field("caption").filter(is_region).unique().to_pylist():
                words.update(name.split())
    return sorted(words)
