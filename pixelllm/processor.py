"""Images, boxes and contexts in, tensors of the model out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature, PreTrainedTokenizerFast

from pixelllm.batches import (
    WHOLE_IMAGE,
    Prompted,
    TextLimits,
    collate_text,
    encode_context,
    fill,
)
from pixelllm.checkpoints import find_file, from_fields
from pixelllm.contexts import REFERRING_CONTEXT
from pixelllm.files import write_text
from pixelllm.images import open_image, to_frame
from pixelllm.records import Box, Phrase

PROCESSOR_FILE = "processor_config.json"


@dataclass(frozen=True)
class ProcessorConfig:
    """What the processor needs besides the tokenizer.

    Args:
        frame: side of the square the images are padded to.
        max_context: context tokens, the end token included.
        max_tokens: words' tokens, begin and end included.
        begin_id: of the trunk.
        context: given where the caller gives none.
        region_context: given for a box where the caller gives none.
    """

    frame: int
    max_context: int
    max_tokens: int = 128
    begin_id: int = 0
    context: str = ""
    region_context: str = ""


class Processor:
    """Turns what people have into what `PixelLLM` takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ProcessorConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def __call__(
        self,
        images: Sequence[str | Path | bytes | Image] | str | Path | bytes | Image,
        boxes: Sequence[Box | Sequence[Box] | None] | None = None,
        contexts: Sequence[str] | str | None = None,
    ) -> BatchFeature:
        """Prepare B images with K prompts each; `**` the result into `model.generate`.

        Args:
            images: paths, encoded bytes or Pillow images; one alone counts as a list of one.
            boxes: per image a box, several boxes (the same number everywhere) or None for the
                whole image; xyxy in [0, 1] of the original image.
            contexts: text given to the model, one per row (image-major) or one for all; None
                takes the recipe's own.

        Returns:
            images uint8[B, 3, S, S], sizes int64[B, 2], boxes float32[B, K, 4], context_ids
            int64[B * K, C] and context_padding bool[B * K, C].

        Raises:
            ValueError: a box is reversed or outside, or the lists differ in length.
        """
        if isinstance(images, (str, Path, bytes, Image)):
            images = [images]
        if not images:
            raise ValueError("no image given")
        framed = [to_frame(open_image(image), self.config.frame) for image in images]
        prompts = _prompts(boxes, len(images))
        if contexts is None:
            given = boxes if boxes is not None else [None] * len(images)
            own = [self.config.context if b is None else self.config.region_context for b in given]
            contexts = [text for text in own for _ in range(prompts.shape[1])]
        elif isinstance(contexts, str):
            contexts = [contexts] * (prompts.shape[0] * prompts.shape[1])
        if len(contexts) != prompts.shape[0] * prompts.shape[1]:
            raise ValueError(
                f"{len(contexts)} contexts for {prompts.shape[0]} images with "
                f"{prompts.shape[1]} prompts each"
            )
        context_ids, context_padding = encode_context(
            contexts, self.tokenizer, self.config.max_context
        )
        return BatchFeature(
            {
                "images": torch.stack([image for image, _ in framed]),
                "sizes": torch.tensor([size for _, size in framed]),
                "boxes": prompts,
                "context_ids": context_ids,
                "context_padding": context_padding,
            }
        )

    def locating(
        self,
        images: Sequence[str | Path | bytes | Image],
        expressions: Sequence[Sequence[str]],
    ) -> BatchFeature:
        """Prepare images with expressions each; `**` the result into `model.locate`.

        Raises ValueError: an expression is empty, or the lists differ in length.
        """
        if len(images) != len(expressions):
            raise ValueError(f"{len(expressions)} lists of expressions for {len(images)} images")
        opened = [open_image(image) for image in images]
        framed = [to_frame(image, self.config.frame) for image in opened]
        chosen = [self._expressions(texts) for texts in expressions]
        limits = TextLimits(self.config.begin_id, self.config.max_tokens, self.config.max_context)
        rows = collate_text(chosen, self.tokenizer, limits)
        return BatchFeature(
            {
                "images": torch.stack([image for image, _ in framed]),
                "sizes": torch.tensor([size for _, size in framed]),
                "image_sizes": torch.tensor([(image.height, image.width) for image in opened]),
                "boxes": rows["boxes"],
                **rows["text"]._asdict(),
                "is_place": rows["with_points"],
            }
        )

    def _expressions(self, texts: Sequence[str]) -> Prompted:
        """Expressions as phrases whose place is to be found."""
        if isinstance(texts, str):
            raise ValueError(f"expected a list of expressions for each image, not {texts!r}")
        empty = [number for number, text in enumerate(texts) if not text.strip()]
        if empty or not texts:
            what = f"expression {empty[0]} is empty" if empty else "no expression given"
            raise ValueError(f"{what}; say what to look for, e.g. 'the red car on the left'")
        texts = [" ".join(text.split()) for text in texts]
        phrases = [Phrase(t, "referring", t, context=t, target_box=WHOLE_IMAGE) for t in texts]
        contexts = (fill(REFERRING_CONTEXT, phrase) for phrase in phrases)
        return Prompted(None, tuple(phrases), tuple(contexts))

    def save_pretrained(self, folder: Path | str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        write_text(Path(folder) / PROCESSOR_FILE, json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: Path | str) -> Processor:
        """From a run's folder or a Hub id."""
        file = find_file(name_or_path, PROCESSOR_FILE)
        config = from_fields(ProcessorConfig, json.loads(file.read_text()), str(file))
        return cls(PreTrainedTokenizerFast.from_pretrained(name_or_path), config)


def check_box(box: Box) -> Box:
    """The box itself. Raises ValueError unless 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1."""
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(
            f"box {tuple(box)}: expected x0 < x1 and y0 < y1 in [0, 1] of the image "
            "(left, top, right, bottom); divide pixels by the image's width and height"
        )
    return box


def _prompts(boxes: Sequence[Box | Sequence[Box] | None] | None, num_images: int) -> torch.Tensor:
    """float32[B, K, 4] from whatever the caller gave."""
    boxes = [None] * num_images if boxes is None else boxes
    if len(boxes) != num_images:
        raise ValueError(f"{len(boxes)} entries of boxes for {num_images} images")
    given = [[WHOLE_IMAGE] if entry is None else entry for entry in boxes]
    if not all(map(len, given)):
        raise ValueError("an image needs at least one box, or None for the whole of it")
    rows = [[entry] if np.ndim(entry[0]) == 0 else entry for entry in given]
    counts = {len(row) for row in rows}
    if len(counts) > 1:
        raise ValueError(f"every image needs the same number of boxes, not {sorted(counts)}")
    checked = [[check_box(tuple(map(float, box))) for box in row] for row in rows]
    return torch.tensor(checked, dtype=torch.float32)
