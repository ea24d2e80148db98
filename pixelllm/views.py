"""What a batch sees of an image: the whole of it, or a random scale, crop and mirror.

Reference, sections 2.1 and 8.3. Phrases and masks are seen through the same window as the pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor

from pixelllm.images import (
    crop_points,
    flip_points,
    open_image,
    pad_frame,
    random_frame,
    resize_masks,
    to_frame,
)
from pixelllm.records import Box, Phrase, Point, Record


class View(NamedTuple):
    """A padded frame and the part of the image that it shows.

    `image` is uint8[3, S, S]; `size` the unpadded (h, w) inside; `window` xyxy in [0, 1] of the
    image, which was mirrored before if `mirrored`.
    """

    image: Tensor
    size: tuple[int, int]
    window: Box = (0.0, 0.0, 1.0, 1.0)
    mirrored: bool = False


def open_record_image(record: Record) -> Image.Image:
    """The record's image, RGB; ValueError or FileNotFoundError name the record."""
    try:
        return open_image(record.path if record.data is None else record.data)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"record {record.id}: {error}") from error


def whole_view(record: Record, frame: int) -> View:
    """The whole image, its longer side as long as the frame."""
    return View(*to_frame(open_record_image(record), frame))


def random_view(
    record: Record,
    frame: int,
    scale: tuple[float, float],
    mirror: float,
    generator: torch.Generator,
) -> View:
    """A random size, then a random crop that fits the frame.

    Args:
        scale: range of the longer side before the crop, over `frame`.
        mirror: chance of left and right changing places.
    """
    image = open_record_image(record)
    mirrored = bool(torch.rand((), generator=generator) < mirror)
    seen = ImageOps.mirror(image) if mirrored else image
    pixels, size, window = random_frame(seen, frame, scale, generator)
    return View(pixels, size, tuple(window.tolist()), mirrored)


def see_phrase(phrase: Phrase, view: View) -> Phrase | None:
    """The phrase with its places in [0, 1] of the view; those outside move onto its border.

    None where nothing is left of the phrase's box.
    """
    boxes = {name: see_place(getattr(phrase, name), view) for name in ("prompt_box", "target_box")}
    for box in boxes.values():
        if box is not None and not (box[0] < box[2] and box[1] < box[3]):
            return None
    pieces = tuple(
        replace(piece, center=see_place(piece.center, view), box=see_place(piece.box, view))
        for piece in phrase.pieces
    )
    return replace(phrase, pieces=pieces, **boxes)


def see_place(place: Point | Box | None, view: View) -> Point | Box | None:
    """A point, or the box around two of them, through the view's window."""
    if place is None:
        return None
    points = torch.tensor(place).view(-1, 2)
    if view.mirrored:
        points = flip_points(points)
    points = crop_points(points, torch.tensor(view.window))
    return (*points.amin(0).tolist(), *points.amax(0).tolist())[-len(place) :]


def see_mask(phrase: Phrase, view: View, frame: int) -> Tensor:
    """The phrase's mask in the padded frame, bool[S, S], nearest neighbour; empty without one."""
    if phrase.mask is None:
        return torch.zeros(frame, frame, dtype=torch.bool)
    mask = torch.from_numpy(coco_mask.decode(phrase.mask))[None]  # uint8[1, H, W]
    if view.mirrored:
        mask = mask.flip(-1)
    (h, w), (x0, y0, x1, y1) = view.size, view.window
    height, width = round(h / (y1 - y0)), round(w / (x1 - x0))  # before the crop
    top, left = round(y0 * height), round(x0 * width)
    mask = resize_masks(mask, (height, width))[0, top : top + h, left : left + w]
    return pad_frame(mask, frame).bool()
