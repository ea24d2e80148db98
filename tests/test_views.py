"""Views: places and masks move with the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from pixelllm.records import Phrase, Piece, Record
from pixelllm.views import View, random_view, see_mask, see_phrase, whole_view

BOX = (0.25, 0.25, 0.5, 0.75)


@pytest.fixture
def record(tmp_path) -> Record:
    """An image that is white inside `BOX`, and a phrase about that part."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = coco_mask.encode(np.asfortranarray(pixels[..., 0] // 255))
    mask["counts"] = mask["counts"].decode()
    pieces = (Piece(0, 5, center=(0.375, 0.5), box=BOX),)
    phrase = Phrase("a/0", "region", "white", "", BOX, pieces, BOX, mask)
    return Record("a", (40, 80), (phrase,), path=str(tmp_path / "a.png"))


@pytest.mark.parametrize("mirror", [0.0, 1.0])
def test_boxes_and_masks_move_with_the_pixels(record: Record, mirror: float) -> None:
    """Catches places in the coordinates of the whole image, and masks of another crop."""
    generator = torch.Generator().manual_seed(3)
    boxes = set()
    for _ in range(8):
        view = random_view(record, 64, (1.0, 1.5), mirror, generator)
        phrase = see_phrase(record.phrases[0], view)
        is_white = view.image[0] > 127
        seen = is_white.nonzero()
        expected = torch.tensor(phrase.target_box) * torch.tensor([*view.size[::-1]] * 2)
        found = torch.cat([seen.amin(0).flip(0), seen.amax(0).flip(0) + 1]).float()
        torch.testing.assert_close(found, expected, atol=1.5, rtol=0)
        assert phrase.prompt_box == phrase.pieces[0].box == phrase.target_box
        x0, y0, x1, y1 = phrase.target_box
        assert x0 < phrase.pieces[0].center[0] < x1 and y0 < phrase.pieces[0].center[1] < y1
        mask = see_mask(phrase, view, 64)
        assert (mask & is_white).sum() > 0.85 * (mask | is_white).sum()
        boxes.add(phrase.target_box)
    assert len(boxes) > 4


def test_a_whole_view_keeps_places(record: Record) -> None:
    view = whole_view(record, 64)
    assert view.size == (32, 64) and see_phrase(record.phrases[0], view) == record.phrases[0]
    mask = see_mask(record.phrases[0], view, 64)
    assert mask.nonzero().amin(0).tolist() == [8, 16] and mask.sum() == 16 * 16


def test_a_phrase_outside_the_window_is_dropped(record: Record) -> None:
    """Catches boxes without area, whose phrases nothing in the view answers to."""
    view = View(torch.empty(0), (32, 64), window=(0.6, 0.0, 1.0, 1.0))
    assert see_phrase(record.phrases[0], view) is None


def test_a_phrase_without_a_mask_gives_an_empty_one(record: Record) -> None:
    view = whole_view(record, 64)
    assert not see_mask(Phrase("b", "referring", "x"), view, 64).any()
