"""Pictures of captions: colours and places of the trace, animation, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from pixelllm.pictures import (
    SAMPLES,
    Knot,
    check_caption,
    curve,
    fit,
    knots,
    still,
    text_between,
    trail_color,
    word_color,
    word_times,
    write_gif,
    write_still,
)


def word(text, point=None, box=None):
    return {"text": text, "point": point, "box": box, "log_prob": -0.5}


@pytest.fixture
def caption(tmp_path):
    """Four words on a plain grey image, the second without a point."""
    path = tmp_path / "grey.png"
    Image.new("RGB", (320, 200), (90, 90, 90)).save(path)
    words = [
        word("A", [0.25, 0.25], [0.2, 0.1, 0.4, 0.5]),
        word("red"),
        word("ball,", [0.75, 0.25], [0.6, 0.1, 0.9, 0.4]),
        word("here.", [0.75, 0.75], None),
    ]
    return {
        "image": str(path),
        "size_hw": [200, 320],
        "caption": "A red ball, here.",
        "words": words,
        "log_prob": -2.0,
    }


def near(color, expected, tolerance=40):
    return max(abs(a - b) for a, b in zip(color, expected, strict=True)) <= tolerance


def test_still_puts_every_stop_where_its_word_points(caption):
    """Would catch swapped axes or coordinates taken in the scaled image's other unit."""
    picture = still(caption, longest=640)
    for index in (0, 2, 3):
        x, y = caption["words"][index]["point"]
        # Beside the number, inside the dot.
        pixel = picture.getpixel((round(x * 640) - 6, round(y * 400)))
        assert near(pixel, word_color(index, 4)), index
    assert picture.width == 640 and picture.height > 400


def test_still_draws_the_line_in_the_order_of_words(caption):
    """The middle of the line is coloured by the time between its two words."""
    caption["words"][2]["point"] = None
    pixel = still(caption, longest=640).getpixel((320, 200))
    assert near(pixel, trail_color(0.5))


def test_still_without_any_point_is_the_image_and_its_text(caption):
    for entry in caption["words"]:
        entry["point"] = entry["box"] = None
    photo = still(caption, longest=640).crop((0, 0, 640, 400))
    assert photo.getextrema() == ((90, 90), (90, 90), (90, 90))


def test_still_of_an_empty_caption(caption):
    caption["words"], caption["caption"] = [], ""
    assert still(caption).width == 1024


def test_gif_plays_the_words_for_as_long_as_they_last(caption, tmp_path):
    write_gif(caption, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        total = 0
        for frame in range(animation.n_frames):
            animation.seek(frame)
            total += animation.info["duration"]
        assert animation.n_frames > 4 and animation.info["loop"] == 0
    assert total / 1000 == pytest.approx(word_times(caption["words"])[-1][1] + 2.5, abs=0.1)


def test_gif_shows_the_point_of_the_word_being_spoken(caption, tmp_path):
    """One frame has the first word's dot and no line; the last frame has the whole line."""
    caption["words"][2]["point"] = None
    write_gif(caption, tmp_path / "a.gif", longest=480)
    with Image.open(tmp_path / "a.gif") as animation:
        animation.seek(1)
        first = animation.convert("RGB")
        animation.seek(animation.n_frames - 1)
        last = animation.convert("RGB")
    assert near(first.getpixel((120, 75)), word_color(0, 4))
    assert near(first.getpixel((240, 150)), (90, 90, 90))
    assert near(last.getpixel((240, 150)), trail_color(0.5))


def test_points_outside_the_image_are_drawn_on_its_border():
    assert knots([word("far", [1.4, -0.2])], 100, 50) == [Knot(0, 100.0, 0.0)]


def test_curve_meets_its_knots_and_does_not_swing_out():
    """After a tiny step a plain Catmull-Rom line overshoots by a tenth of the long step."""
    trail = [Knot(0, 0, 0), Knot(1, 100, 0), Knot(2, 101, 0), Knot(3, 101, 100)]
    line = curve(trail)
    np.testing.assert_allclose(line[::SAMPLES], [knot[1:] for knot in trail], atol=1e-9)
    assert (line.min(0) >= -0.5).all() and (line.max(0) <= (101.5, 100.5)).all()


def test_no_text_of_the_caption_is_lost():
    caption = {"caption": "“A red, red ball”!", "words": [word("A"), word("red"), word("red")]}
    gaps, tail = text_between(caption)
    assert gaps == ["“", " ", ", "] and tail == " ball”!"


def test_normalised_words_are_shown_as_they_are():
    gaps, tail = text_between({"caption": "A Ball", "words": [word("a"), word("ball")]})
    assert gaps == ["", " "] and tail == ""


def test_colours_run_from_the_first_to_the_last_stop():
    assert trail_color(0) == (0x5B, 0x8C, 0xFF) and trail_color(1) == (0xF7, 0xCF, 0x4D)
    assert word_color(0, 1) == trail_color(0)


def test_fit_keeps_the_aspect():
    assert fit(Image.new("RGB", (300, 100)), 150).size == (150, 50)
    assert fit(Image.new("RGB", (1, 900)), 300).size == (1, 300)


def test_non_finite_point_names_image_and_word(caption):
    caption["words"][2]["point"] = [0.5, math.nan]
    with pytest.raises(ValueError, match=r"grey.png: word 2 \('ball,'\) has point"):
        check_caption(caption)


def test_word_without_its_fields_is_named(caption):
    del caption["words"][1]["box"]
    with pytest.raises(ValueError, match="grey.png: word 1 needs text, point and box"):
        check_caption(caption)


def test_missing_field_is_named(caption):
    del caption["size_hw"]
    with pytest.raises(ValueError, match="no 'size_hw'"):
        still(caption)


def test_wrong_size_is_refused(caption):
    """A caption made on an image that was not rotated would be drawn in wrong places."""
    caption["size_hw"] = [320, 200]
    with pytest.raises(ValueError, match="grey.png: size_hw says"):
        still(caption)


def test_rotated_photo_is_shown_upright(caption, tmp_path):
    image = Image.new("RGB", (60, 40), "white")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    caption |= {"image": tmp_path / "turned.jpg", "size_hw": [60, 40]}
    assert still(caption, longest=300).width == 200


def test_write_still_is_a_png(caption, tmp_path):
    write_still(caption, tmp_path / "a.png", longest=200)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.width == 200


def test_words_with_narrow_boxes_are_drawn(caption, tmp_path):
    """Would catch fractional corners, on which Pillow fails for boxes a few pixels wide."""
    for step in range(40):
        box = [0.5, 0.5, 0.5 + step / 1000, 0.5 + step / 777]
        caption["words"] = [word("A", [0.5, 0.5], box)]
        caption["caption"] = "A"
        write_gif(caption, tmp_path / "narrow.gif", longest=97)
