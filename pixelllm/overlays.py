"""Pictures of found objects: boxes, labels and translucent masks in colours that differ."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pixelllm.files import written_whole
from pixelllm.pictures import INK, Color, fit
from pixelllm.records import Box

# Neighbours in this order are far apart; dark text stays readable on all of them.
COLORS = (
    "#5b8cff", "#ff9a4a", "#3fc48a", "#e05bd6", "#f7cf4d",
    "#ff6b7f", "#4cc4e0", "#9a6bff", "#a5cf4d", "#d39a68",
)  # fmt: skip
MASK_OPACITY = 0.45
LABEL_LINES = 3


class FoundObject(NamedTuple):
    """What is drawn of an object: xyxy in [0, 1], its label, and a mask bool[H, W] or None."""

    box: Box
    label: str
    mask: np.ndarray | None = None


class _Place(NamedTuple):
    """A rectangle in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: _Place) -> bool:
        apart = self.x1 <= other.x0 or other.x1 <= self.x0
        return not (apart or self.y1 <= other.y0 or other.y1 <= self.y0)


def object_color(index: int) -> Color:
    """RGB of the object with this number; colours come again after ten."""
    return tuple(bytes.fromhex(COLORS[index % len(COLORS)][1:]))


def draw_objects(
    image: Image.Image, objects: Sequence[FoundObject], longest: int = 1024
) -> Image.Image:
    """The RGB image, its longer side `longest` pixels, under the objects, the first on top.

    Labels stay inside the picture and beside each other; one that finds no room at its box is
    left out, which happens to the last of many.
    """
    picture = fit(image, longest)
    for index, found in reversed(list(enumerate(objects))):
        if found.mask is not None:
            _draw_mask(picture, found.mask, object_color(index))
    boxes = [_to_pixels(found.box, picture.size) for found in objects]
    draw = ImageDraw.Draw(picture)
    thick = max(2, longest // 340)
    for index, box in reversed(list(enumerate(boxes))):
        draw.rectangle(_grown(box, 1), outline="white", width=thick + 2)
        draw.rectangle(box, outline=object_color(index), width=thick)
    font = ImageFont.load_default(max(13, longest // 50))
    taken: list[_Place] = []
    for index, (found, box) in enumerate(zip(objects, boxes, strict=True)):
        _draw_label(draw, found.label, box, object_color(index), font, taken)
    return picture


def write_objects(image: Image.Image, objects: Sequence[FoundObject], path: Path | str) -> None:
    """Write `draw_objects` as a PNG file."""
    picture = draw_objects(image, objects)
    with written_whole(path) as beside:
        picture.save(beside, format="PNG")


def _to_pixels(box: Box, size: tuple[int, int]) -> _Place:
    pairs = zip(box, size * 2, strict=True)
    return _Place(*(round(min(max(value, 0.0), 1.0) * (side - 1)) for value, side in pairs))


def _grown(place: _Place, margin: float) -> _Place:
    x0, y0, x1, y1 = place
    return _Place(x0 - margin, y0 - margin, x1 + margin, y1 + margin)


def _draw_mask(picture: Image.Image, mask: np.ndarray, color: Color) -> None:
    """A translucent area with a white border."""
    area = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size)
    picture.paste(color, mask=area.point(lambda value: round(value * MASK_OPACITY)))
    inner = area.filter(ImageFilter.MinFilter(5))
    border = Image.fromarray(np.asarray(area) - np.minimum(np.asarray(inner), np.asarray(area)))
    picture.paste("white", mask=border)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: _Place,
    color: Color,
    font: ImageFont.FreeTypeFont,
    taken: list[_Place],
) -> None:
    """The text on its colour, at the first free place around the box."""
    width, height = draw.im.size
    margin = font.size / 3
    lines = _wrapped(text, font, min(width - 2 * margin, 24 * font.size))
    _, _, right, bottom = draw.multiline_textbbox((0, 0), lines, font)
    size = (math.ceil(right + 2 * margin), math.ceil(bottom + 2 * margin))
    for place in _places(box, size, width):
        inside = place.x0 >= 0 and place.y0 >= 0 and place.x1 <= width and place.y1 <= height
        if inside and not any(map(place.overlaps, taken)):
            draw.rounded_rectangle(place, margin, fill=color)
            draw.text((place.x0 + margin, place.y0 + margin * 0.8), lines, INK, font)
            taken.append(place)
            return


def _wrapped(text: str, font: ImageFont.FreeTypeFont, limit: float) -> str:
    """The text in lines of at most `limit` pixels, shortened after the third."""
    for count in range(min(len(text), 80), 0, -1):
        lines = textwrap.wrap(text, count, max_lines=LABEL_LINES, placeholder="…")
        if all(font.getlength(line) <= limit for line in lines):
            return "\n".join(lines)
    return ""


def _places(box: _Place, size: tuple[float, float], width: int) -> Iterator[_Place]:
    """Where a label of `size` (w, h) may lie: on the box, in it, under it, and stacked from there.

    Its left side is the box's, as far as the picture is wide enough.
    """
    w, h = size
    x = max(0, min(box.x0, width - w))
    stacked = [box.y0 + k * h for k in range(1, 5)]
    for y in (box.y0 - h, box.y0, box.y1, *stacked, box.y0 - 2 * h, box.y1 + h, box.y1 - h):
        yield _Place(x, y, x + w, y + h)
