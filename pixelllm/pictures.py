"""Stills and animations of captions: the image, the trace, and every word in its own colour.

A caption is the dictionary that `pixelllm caption --json` prints: `image`, `size_hw`, `caption`,
`words` (each `text`, `point`, `box`, `log_prob`; point and box may be null) and `log_prob`;
points (x, y) and boxes xyxy in [0, 1] of the original image. Points a little outside the image
are drawn on its border. Words say when they are spoken by their length: `word_times`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont
from scipy.interpolate import CubicHermiteSpline

from pixelllm.files import written_whole
from pixelllm.images import open_image

# One hue after another at about the same lightness: dark text stays readable on all of them.
TRAIL = ("#5b8cff", "#9a6bff", "#e05bd6", "#ff6b7f", "#ff9a4a", "#f7cf4d")
PAPER, INK, FADED = (252, 251, 249), (28, 27, 26), (176, 172, 167)
SAMPLES = 12  # straight pieces per curve between two points
PHOTO_COLORS = 200  # of a GIF's 256; the rest are for the trail and the text
STOP = 0.05  # points closer than this share of the image are one numbered stop


Color = tuple[int, int, int]  # RGB


class Knot(NamedTuple):
    """A word's point on a picture: place in the sentence, and pixels."""

    word: int
    x: float
    y: float


def check_caption(caption: dict[str, Any]) -> None:
    """Raise ValueError naming the image, the word and the field that break the contract."""
    name = caption.get("image", "caption without an image")
    for key in ("image", "size_hw", "caption", "words"):
        if key not in caption:
            raise ValueError(f"{name}: the caption has no {key!r}; found {sorted(caption)}")
    for number, word in enumerate(caption["words"]):
        if not {"text", "point", "box"} <= word.keys():
            raise ValueError(f"{name}: word {number} needs text, point and box; found {word}")
        for key, length in (("point", 2), ("box", 4)):
            place = word[key]
            if place is not None and (len(place) != length or not all(map(math.isfinite, place))):
                raise ValueError(
                    f"{name}: word {number} ({word['text']!r}) has {key} {place}; "
                    f"expected {length} finite numbers in [0, 1] of the image, or null"
                )


def open_picture(caption: dict[str, Any]) -> Image.Image:
    """The caption's image, upright and RGB.

    Raises ValueError where its size is not `size_hw`, and as `check_caption`.
    """
    check_caption(caption)
    image = open_image(caption["image"])
    stated, found = list(caption["size_hw"]), [image.height, image.width]
    if stated != found:
        raise ValueError(
            f"{caption['image']}: size_hw says {stated}, the image opens as {found}; "
            "was it changed, or captioned without its rotation?"
        )
    return image


def trail_color(position: float) -> Color:
    """RGB of a moment of the sentence, from 0 (first word) to 1 (last word)."""
    scaled = _clamp(position) * (len(TRAIL) - 1)
    first = min(int(scaled), len(TRAIL) - 2)
    pair = [bytes.fromhex(stop[1:]) for stop in TRAIL[first : first + 2]]
    return tuple(round(a + (b - a) * (scaled - first)) for a, b in zip(*pair, strict=True))


def word_color(index: int, count: int) -> Color:
    return trail_color(index / max(count - 1, 1))


def word_times(words: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Start and end of every word in seconds, at an easy reading pace."""
    times, now = [], 0.0
    for word in words:
        pause = 0.25 if word["text"].endswith((".", ",", ";", "!", "?")) else 0.0
        end = now + 0.2 + 0.03 * len(word["text"]) + pause
        times.append((now, end))
        now = end
    return times


def text_between(caption: dict[str, Any]) -> tuple[list[str], str]:
    """The text before every word and after the last one, so that nothing of the caption is lost."""
    gaps, cursor = [], 0
    for word in caption["words"]:
        start = caption["caption"].find(word["text"], cursor)
        if start < 0:  # words were normalised: show them as they are
            return ["", *[" "] * (len(caption["words"]) - 1)][: len(caption["words"])], ""
        gaps.append(caption["caption"][cursor:start])
        cursor = start + len(word["text"])
    return gaps, caption["caption"][cursor:]


def fit(image: Image.Image, longest: int) -> Image.Image:
    """The image scaled so that its longer side has `longest` pixels."""
    scale = longest / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def knots(words: Sequence[dict[str, Any]], width: float, height: float) -> list[Knot]:
    """Points of the words that have one, in pixels of a picture, held inside it."""
    placed = [(i, *word["point"]) for i, word in enumerate(words) if word["point"] is not None]
    return [Knot(i, _clamp(x) * width, _clamp(y) * height) for i, x, y in placed]


def _clamp(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def curve(trail: Sequence[Knot]) -> np.ndarray:
    """A smooth line through two or more knots, float[n, 2]: `SAMPLES` points for every knot's way.

    Cubic Hermite. No tangent is longer than the shorter way to a neighbour: a plain Catmull-Rom
    line swings out after a short step, to places no word points at.
    """
    points = np.array([(knot.x, knot.y) for knot in trail])
    around = np.pad(points, ((1, 1), (0, 0)), mode="edge")
    chords, ways = around[2:] - around[:-2], np.linalg.norm(np.diff(around, axis=0), axis=1)
    speeds = 0.6 * np.minimum(ways[1:], ways[:-1]) / np.linalg.norm(chords, axis=1).clip(1e-9)
    line = CubicHermiteSpline(range(len(points)), points, chords * speeds[:, None])
    return line(np.arange((len(points) - 1) * SAMPLES + 1) / SAMPLES)


def still(caption: dict[str, Any], longest: int = 1024) -> Image.Image:
    """One RGB picture: the image with numbered stops of the trace, the caption below it.

    Consecutive words that point at about the same place share a stop; a word's underline has
    the colour of its piece of the line.
    """
    return _sheet(caption, fit(open_picture(caption), longest), _stops(caption["words"]))


def write_still(caption: dict[str, Any], path: Path | str, longest: int = 1024) -> None:
    """Write `still` as a PNG file."""
    picture = still(caption, longest)
    with written_whole(path) as beside:
        picture.save(beside, format="PNG")


def write_gif(caption: dict[str, Any], path: Path | str, longest: int = 480) -> None:
    """Write an endless animation: the words light up one by one while the trace is drawn."""
    photo = fit(open_picture(caption), longest)
    dithered = photo.quantize(PHOTO_COLORS)
    palette = _gif_palette(dithered)
    frames, durations = [], []
    for until, active, seconds in _moments(caption["words"]):
        sheet = _sheet(caption, photo, {}, until, active)
        frame = sheet.quantize(palette=palette, dither=Image.Dither.NONE)
        # Dither only the photo, once: noise that changes would be stored in every frame.
        drawn = ImageChops.difference(sheet.crop((0, 0, *photo.size)), photo).convert("L")
        frame.paste(dithered, mask=drawn.point([255] + [0] * 255))
        frames.append(frame)
        durations.append(round(seconds * 100) * 10)  # GIF counts hundredths of a second
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    with written_whole(path) as beside:
        frames[0].save(beside, "GIF", **options)


def _moments(words: Sequence[dict[str, Any]]) -> Iterator[tuple[float, int | None, float]]:
    """(how far the pen is, in words; the word being spoken; seconds) of every frame.

    Two frames a word: the pen on its way, and at the word's point.
    """
    for index, (start, end) in enumerate(word_times(words)):
        yield index + 0.2, index, 0.3 * (end - start)
        yield index + 0.5, index, 0.7 * (end - start)
    yield len(words), None, 2.5


def _sheet(
    caption: dict[str, Any],
    photo: Image.Image,
    stops: dict[int, int],
    until: float = math.inf,
    active: int | None = None,
) -> Image.Image:
    """The photo with what is drawn on it up to the word position `until`, over the caption."""
    words, picture = caption["words"], photo.copy()
    trail = knots(words, *photo.size)
    _draw_trail(picture, trail, len(words), until)
    _draw_stops(picture, trail, stops, len(words))
    if active is not None and until >= active + 0.5:
        _draw_word(picture, words[active], word_color(active, len(words)))
    panel = _panel(caption, photo.width, stops, until, active)
    sheet = Image.new("RGB", (photo.width, photo.height + panel.height))
    sheet.paste(picture)
    sheet.paste(panel, (0, photo.height))
    return sheet


def _stops(words: Sequence[dict[str, Any]]) -> dict[int, int]:
    """First word of every stop -> its number, counted from 1."""
    stops: dict[int, int] = {}
    anchor = None
    for index, word in enumerate(words):
        point = word["point"]
        if point is not None and (anchor is None or math.dist(point, anchor) > STOP):
            stops[index] = len(stops) + 1
            anchor = point
    return stops


def _draw_trail(photo: Image.Image, trail: Sequence[Knot], count: int, until: float) -> None:
    """Draw the line up to the word position `until` (a word's point is reached at its middle)."""
    if len(trail) < 2:
        return
    double = Image.new("RGBA", (2 * photo.width, 2 * photo.height))  # halved later: smooth edges
    draw = ImageDraw.Draw(double)
    width = max(6, round(max(photo.size) / 110))
    points = [tuple(point) for point in 2 * curve(trail)]
    middles = np.arange(0.5, len(points) - 1) / SAMPLES
    moments = np.interp(middles, range(len(trail)), [knot.word for knot in trail])
    lines = [
        (*ends, trail_color(moment / max(count - 1, 1)))
        for ends, moment in zip(pairwise(points), moments, strict=True)
        if moment <= until - 0.5
    ]
    for extra, alpha in ((width * 0.8, 210), (0, 255)):  # a white casing under the colours
        for start, end, color in lines:
            fill = (*(color if alpha == 255 else (255, 255, 255)), alpha)
            thick = width + extra
            draw.line((start, end), fill=fill, width=round(thick))
            for x, y in (start, end):
                draw.circle((x, y), thick / 2, fill=fill)
    overlay = double.reduce(2)
    photo.paste(overlay, mask=overlay)


def _draw_dot(photo: Image.Image, x: float, y: float, radius: float, color: Color) -> None:
    """A filled circle with a white ring, smooth-edged."""
    size = math.ceil(radius) * 2 + 6
    left, top = math.floor(x - size / 2), math.floor(y - size / 2)
    dot = Image.new("RGBA", (4 * size, 4 * size), (255, 255, 255, 0))
    draw = ImageDraw.Draw(dot)
    center = (4 * (x - left), 4 * (y - top))
    draw.circle(center, 4 * (radius + 2), fill="white")
    draw.circle(center, 4 * radius, fill=color)
    dot = dot.reduce(4)
    photo.paste(dot, (left, top), mask=dot)


def _draw_stops(
    photo: Image.Image, trail: Sequence[Knot], stops: dict[int, int], count: int
) -> None:
    radius = max(9.0, max(photo.size) / 78)
    font = ImageFont.load_default(radius * 1.2)
    for word, x, y in reversed(trail):  # the first stops lie on top
        if word in stops:
            _draw_dot(photo, x, y, radius, word_color(word, count))
            label = str(stops[word])
            ImageDraw.Draw(photo).text((x, y), label, fill=INK, font=font, anchor="mm")


def _draw_word(photo: Image.Image, word: dict[str, Any], color: Color) -> None:
    """The box and the point of the word being spoken."""
    if word["box"] is not None:
        pairs = zip(word["box"], photo.size * 2, strict=True)
        # Whole pixels: Pillow fails on fractional corners of narrow rounded boxes.
        x0, y0, x1, y1 = (round(_clamp(value) * (side - 1)) for value, side in pairs)
        if x1 >= x0 and y1 >= y0:
            draw = ImageDraw.Draw(photo)
            draw.rounded_rectangle((x0, y0, x1, y1), 6, outline="white", width=4)
            if min(x1 - x0, y1 - y0) >= 2:  # room for the colour inside the white
                draw.rounded_rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), 5, outline=color, width=2)
    for knot in knots([word], *photo.size):
        _draw_dot(photo, knot.x, knot.y, max(6.0, max(photo.size) / 70), color)


def _panel(
    caption: dict[str, Any], width: int, stops: dict[int, int], said: float, active: int | None
) -> Image.Image:
    """The caption as a strip of `width` pixels, every word over a line of its colour."""
    size = max(15, width // 42)
    font, small = ImageFont.load_default(size), ImageFont.load_default(size * 0.66)
    margin, leading = round(size * 1.1), round(size * 1.75)
    panel = Image.new("RGB", (width, 200 * leading), PAPER)
    draw = ImageDraw.Draw(panel)
    words, (gaps, tail) = caption["words"], text_between(caption)
    x, y = margin, margin
    for index, (word, gap) in enumerate(zip(words, gaps, strict=True)):
        number = str(stops.get(index, ""))
        label = small.getlength(number) + size * 0.1 if number else 0
        after = (gaps[index + 1] if index + 1 < len(words) else tail).rstrip()
        length = font.getlength(word["text"])
        x += font.getlength(gap if x > margin else gap.lstrip())
        if x > margin and x + label + length + font.getlength(after) > width - margin:
            x, y = margin, y + leading
        color = word_color(index, len(words))
        draw.text((x, y - size * 0.1), number, fill=INK, font=small)
        x += label
        spoken = index < said
        if index == active:
            box = (x - 3, y - size * 0.12, x + length + 3, y + size * 1.32)
            draw.rounded_rectangle(box, size / 4, fill=color)
        elif word["point"] is not None and spoken:
            draw.rectangle((x, y + size * 1.25, x + length, y + size * 1.25 + size // 9), color)
        draw.text((x, y), word["text"], fill=INK if spoken else FADED, font=font)
        x += length
    draw.text((x, y), tail, fill=INK if len(words) <= said else FADED, font=font)
    return panel.crop((0, 0, width, y + leading + margin // 2))


def _gif_palette(dithered: Image.Image) -> Image.Image:
    """The colours of a quantised photo, at their places, then those of the trail and the text."""
    colors = dithered.getpalette()[: 3 * PHOTO_COLORS]
    colors += [0] * (3 * PHOTO_COLORS - len(colors))
    for k in range(32):
        colors += trail_color(k / 31)
    for k in range(16):
        colors += [round(p + (i - p) * k / 15) for p, i in zip(PAPER, INK, strict=True)]
    colors += [255, 255, 255]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    return palette
