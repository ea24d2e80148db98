"""Pictures of found objects: colours where they belong, labels inside and apart."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pixelllm import overlays
from pixelllm.overlays import FoundObject, draw_objects, object_color, write_objects

GREY = (90, 90, 90)


@pytest.fixture
def grey() -> Image.Image:
    return Image.new("RGB", (320, 200), GREY)


def near(color, expected, tolerance=12):
    return max(abs(a - b) for a, b in zip(color, expected, strict=True)) <= tolerance


def labels(monkeypatch, image, objects, **options) -> list[tuple[float, float, float, float]]:
    """Where the labels were drawn: their rounded rectangles, in pixels."""
    drawn = []
    original = overlays.ImageDraw.ImageDraw.rounded_rectangle

    def noted(self, place, *arguments, **settings):
        drawn.append(tuple(place))
        return original(self, place, *arguments, **settings)

    monkeypatch.setattr(overlays.ImageDraw.ImageDraw, "rounded_rectangle", noted)
    draw_objects(image, objects, **options)
    return drawn


def test_a_box_is_drawn_where_it_lies(grey):
    """Would catch swapped axes, or shares taken as pixels of the small image."""
    picture = draw_objects(grey, [FoundObject((0.25, 0.5, 0.75, 0.9), "")], longest=640)
    assert picture.size == (640, 400)
    for x, y in ((160, 280), (479, 280), (320, 359)):  # left, right and lower side
        assert near(picture.getpixel((x, y)), object_color(0)), (x, y)
    for x, y in ((320, 280), (150, 280), (490, 280), (320, 372)):  # in it and around it
        assert picture.getpixel((x, y)) == GREY, (x, y)


def test_a_mask_lets_the_image_through(grey):
    mask = np.zeros((200, 320), dtype=bool)
    mask[:100, 160:] = True
    picture = draw_objects(grey, [FoundObject((0, 0, 1, 1), "", mask)], longest=640)
    mixed = [0.55 * 90 + 0.45 * value for value in object_color(0)]
    assert near(picture.getpixel((480, 60)), mixed)
    assert picture.getpixel((100, 60)) == picture.getpixel((480, 300)) == GREY


def test_neighbours_have_other_colours():
    colors = [object_color(index) for index in range(10)]
    assert len(set(colors)) == 10 and object_color(10) == colors[0]
    assert all(max(color) > 180 for color in colors)  # dark text is legible on it


@pytest.mark.parametrize("size", [(320, 200), (200, 320), (1600, 90)])
def test_labels_stay_inside_and_apart(monkeypatch, size):
    corners = ((0, 0, 0.1, 0.1), (0.9, 0, 1, 0.1), (0, 0.9, 0.1, 1), (0.9, 0.9, 1, 1))
    found = [FoundObject(box, f"{n} an object with quite a name") for n, box in enumerate(corners)]
    image = Image.new("RGB", size, GREY)
    places = labels(monkeypatch, image, found, longest=640)
    width, height = draw_objects(image, [], longest=640).size
    assert len(places) >= (4 if height > 100 else 1)
    for n, (x0, y0, x1, y1) in enumerate(places):
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        for a0, b0, a1, b1 in places[:n]:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0


def test_objects_at_the_same_place_keep_their_labels(monkeypatch, grey):
    found = [FoundObject((0.2, 0.3, 0.8, 0.9), f"expression {n}") for n in range(5)]
    assert len(labels(monkeypatch, grey, found)) == 5


def test_a_long_label_is_wrapped_then_shortened():
    font = overlays.ImageFont.load_default(20)
    text = "W" * 40 + " and " * 60
    lines = overlays._wrapped(text, font, 300).split("\n")
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 300 for line in lines)
    assert overlays._wrapped("a cat", font, 300) == "a cat"


def test_hundreds_of_objects_and_flat_boxes_are_drawn(grey):
    boxes = np.random.default_rng(0).random((300, 2, 2)).astype(float)
    found = [
        FoundObject((*box.min(0).tolist(), *box.max(0).tolist()), "an object") for box in boxes
    ]
    flat = [FoundObject((0.5, 0.5, 0.5, 0.5), "a point"), FoundObject((0, 0, 1, 1), "é 中 \n x")]
    assert draw_objects(grey, [*found, *flat]).size == (1024, 640)


def test_a_picture_of_one_row_is_drawn():
    """Nothing fits on it; that is no reason to fail."""
    assert draw_objects(Image.new("RGB", (900, 1)), [FoundObject((0, 0, 1, 1), "a")]).height == 1


def test_the_file_is_a_png_and_the_image_stays_as_it_was(grey, tmp_path):
    write_objects(grey, [FoundObject((0.1, 0.1, 0.9, 0.9), "a")], tmp_path / "a.out")
    with Image.open(tmp_path / "a.out") as picture:
        assert picture.format == "PNG" and picture.size == (1024, 640)
    assert grey.getextrema() == ((90, 90),) * 3
