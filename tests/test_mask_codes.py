"""Masks as run lengths and polygons, by round trips through pycocotools' rasteriser."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pixelllm.mask_codes import decode_mask, encode_mask, fill_polygons, trace_mask

RING = np.array(
    [
        [1, 1, 1, 1, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 1, 1, 1],
    ],
    dtype=bool,
)


def signed_area(polygon: list[tuple[float, float]]) -> float:
    """Positive where the polygon runs clockwise on screen."""
    (x, y), (next_x, next_y) = np.array(polygon).T, np.roll(polygon, -1, 0).T
    return float((x * next_y - next_x * y).sum() / 2)


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:37, :53]
    return {
        "empty": np.zeros((4, 7), dtype=bool),
        "full": np.ones((4, 7), dtype=bool),
        "pixel": np.eye(1, dtype=bool),
        "diagonal": np.eye(6, dtype=bool),
        "ring": RING,
        "disc": (x - 20) ** 2 + (y - 15) ** 2 < 150,
        "noise": rng.random((23, 31)) < 0.5,
        "checkerboard": (x + y) % 2 == 0,
        "border": (x < 3) | (y > 30),
    }


@pytest.mark.parametrize("name", masks())
def test_polygons_and_run_lengths_lose_nothing(name: str):
    mask = masks()[name]
    assert np.array_equal(decode_mask(json.loads(json.dumps(encode_mask(mask)))), mask)
    polygons = json.loads(json.dumps(trace_mask(mask)))
    assert np.array_equal(fill_polygons(polygons, mask.shape), mask)


def test_run_lengths_are_those_of_coco():
    """Catches rows and columns exchanged, which a round trip would forgive."""
    code = encode_mask(RING)
    assert code["size"] == [3, 5]
    assert int(coco_mask.area(code)) == RING.sum()
    assert coco_mask.toBbox(code).tolist() == [0, 0, 5, 3]
    column = np.zeros((2, 3), dtype=bool)
    column[:, 1] = True
    expected = coco_mask.frPyObjects({"size": [2, 3], "counts": [2, 2, 2]}, 2, 3)["counts"]
    assert encode_mask(column)["counts"] == expected.decode()


def test_a_hole_is_a_polygon_of_its_own():
    outer, hole = sorted(trace_mask(RING), key=signed_area, reverse=True)
    assert len(outer) == 6 and len(hole) == 4  # only corners
    assert signed_area(outer) * RING.size == pytest.approx(13)
    assert signed_area(hole) * RING.size == pytest.approx(-2)
    assert {point for point in hole} == {(0.2, 1 / 3), (0.6, 1 / 3), (0.6, 2 / 3), (0.2, 2 / 3)}


def test_polygons_are_drawn_at_any_size():
    doubled = fill_polygons(trace_mask(RING), (6, 10))
    assert np.array_equal(doubled, RING.repeat(2, 0).repeat(2, 1))
