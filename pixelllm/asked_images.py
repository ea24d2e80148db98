"""Between the images that a PerceptionGPT is asked about and the squares that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from torch import Tensor

from pixelllm.boxes import order_corners
from pixelllm.conversations import Referent
from pixelllm.locating import Location
from pixelllm.mask_codes import encode_mask
from pixelllm.processor import check_box
from pixelllm.records import Box
from pixelllm.squares import unsquare_boxes, unsquare_mask

EncodedMask = dict[str, Any]  # COCO's run-length encoding


@dataclass(frozen=True)
class Rows:
    """Images have `width` rows each, of which the first `counts[i]` were asked for."""

    width: int
    counts: list[int]

    def of(self, found: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [list(row[:n]) for row, n in zip(found, self.counts, strict=True)]


def check_one_each(images: Sequence[Image], given: Sequence[Any], what: str) -> None:
    """Raise ValueError unless there is a list for every image, and something in it."""
    if not images or len(images) != len(given):
        raise ValueError(f"{len(given)} lists of {what} for {len(images)} images")
    for number, of_image in enumerate(given):
        if isinstance(of_image, str) or not of_image:
            raise ValueError(f"image {number}: expected a list of {what}, not {of_image!r}")


def to_referent(box: Box, mask: EncodedMask | None, size: tuple[int, int]) -> Referent:
    """An object of an image of this size. Raises ValueError for a wrong box, or mask's size."""
    if mask is not None and tuple(mask["size"]) != size:
        raise ValueError(f"mask of {tuple(mask['size'])} (H, W) for an image of {size}")
    return Referent(check_box(tuple(map(float, box))), mask)


def roomy_box(box: Box, least: float = 1e-3) -> Box:
    """The box with sides of at least so much, which a predicted one need not have."""
    x0, y0 = (min(corner, 1 - least) for corner in box[:2])
    return (x0, y0, max(box[2], x0 + least), max(box[3], y0 + least))


def size_of(image: Image) -> tuple[int, int]:
    return image.height, image.width


def to_location(box: Tensor, score: float, mask: Tensor | None, size: tuple[int, int]) -> Location:
    """A box float[4] and mask logits float[h, w] over the square, on the image of this size."""
    inside = unsquare_boxes(order_corners(box.float()), size).cpu().tolist()
    if mask is None:
        return Location(tuple(inside), score)
    return Location(
        tuple(inside), score, encode_mask((unsquare_mask(mask, size) > 0).cpu().numpy())
    )
