"""The padded square: the published numbers, and there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import load_perception, perception_names
from PIL import Image

from pixelllm.squares import (
    square_boxes,
    square_image,
    square_mask,
    unsquare_boxes,
    unsquare_mask,
)


@pytest.mark.parametrize("name", perception_names("preprocess"))
def test_golden_boxes_of_the_square(name: str):
    """The release rounds to thousandths; ours lie within half of one."""
    case = {key: value.numpy() for key, value in load_perception(name).items()}
    for (width, height), box, expected, expected_px in zip(
        case["in.wh"].astype(int).tolist(),
        case["in.boxes_px"],
        case["out.boxes_norm"],
        case["out.boxes_square_px"],
        strict=True,
    ):
        relative = torch.from_numpy(box).double() / torch.tensor([width, height] * 2)
        found = square_boxes(relative, (height, width))
        np.testing.assert_allclose(found, expected, rtol=0, atol=5.01e-4)
        np.testing.assert_allclose(found.round(decimals=3), expected, rtol=1e-4, atol=1e-4)
        side = max(width, height)
        np.testing.assert_allclose(found * side, expected_px.clip(0, side), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", perception_names("preprocess"))
def test_golden_masks_of_the_square(name: str):
    case = {key: value.numpy() for key, value in load_perception(name).items()}
    names = [key[3:] for key in case if key.startswith("in.mask")]
    assert names
    for name in names:
        expected = case[f"out.{name}"][0]
        found = square_mask(case[f"in.{name}"], expected.shape[0])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(60, 91), (91, 60), (50, 50)])
def test_boxes_and_masks_come_back(size: tuple[int, int]):
    """Catches x and y, or the two paddings, in each other's place."""
    box = torch.tensor([[0.2, 0.1, 0.9, 0.5]])
    inside = square_boxes(box, size)
    torch.testing.assert_close(unsquare_boxes(inside, size), box, rtol=0, atol=1e-6)
    mask = np.zeros(size, dtype=bool)
    mask[size[0] // 4 : size[0] // 2, size[1] // 3 :] = True
    back = unsquare_mask(square_mask(mask, max(size)), size)
    assert back.shape == size and np.array_equal(back.numpy() > 0.5, mask)


def test_the_image_lies_where_its_boxes_say():
    image = Image.new("RGB", (40, 80), (255, 0, 0))
    square = square_image(image, 32)
    (x0, y0, x1, y1) = (square_boxes(torch.tensor([0.0, 0, 1, 1]), (80, 40)) * 32).int().tolist()
    assert (x0, y0, x1, y1) == (8, 0, 24, 32) and square.dtype == torch.uint8
    red = (square[1] < 128).numpy()
    assert red[y0:y1, x0:x1].all() and red.sum() == (x1 - x0) * (y1 - y0)
    assert (square[:, :, 0] == 255).all()  # white beside it


def test_what_lies_on_the_padding_moves_onto_the_border():
    box = unsquare_boxes(torch.tensor([0.0, 0.0, 0.5, 1.0]), (50, 100))
    assert box.tolist() == [0, 0, 0.5, 1]
