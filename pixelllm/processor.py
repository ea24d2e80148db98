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

from pixelllm.batches import WHOLE_IMAGE, encode_context
from pixelllm.checkpoints import find_file, from_fields, write_text
from pixelllm.images import open_image, to_frame
from pixelllm.records import Box

PROCESSOR_FILE = "processor_config.json"


@dataclass(frozen=True)
class ProcessorConfig:
    """What the processor needs besides the tokenizer.

    Args:
        frame: side of the square the images are padded to.
        max_context: context tokens, the end token included.
        context: given where the caller gives none.
        region_context: given for a box where the caller gives none.
    """

    frame: int
    max_context: int
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
