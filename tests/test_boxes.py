"""Box and point helpers against the official numbers, and round trips."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import golden_names, load_golden

from pixelllm.boxes import boxes_to_points, point_grid, points_to_boxes, to_pixels, to_relative


@pytest.fixture(params=golden_names("geometry_utils"))
def case(request):
    return load_golden(request.param)


def test_golden_point_grid(case):
    keys = [key for key in case.arrays if key.startswith("out.solid_grid")]
    assert keys
    for key in keys:
        per_side, offset = re.fullmatch(r"out\.solid_grid_n(-?\d+)_(.*)", key).groups()
        grid = point_grid(int(per_side), centered=offset == "offset")
        torch.testing.assert_close(grid, case.tensor(key), **case.tolerance)


def test_golden_boxes_to_points(case):
    keys = [key for key in case.arrays if key.startswith("out.boxes_to_points")]
    assert keys
    for key in keys:
        per_side, offset = re.fullmatch(r"out\.boxes_to_points_n(-?\d+)_(.*)", key).groups()
        grid = point_grid(int(per_side), centered=offset == "offset")
        points = boxes_to_points(case.tensor("in.boxes"), grid)
        torch.testing.assert_close(points, case.tensor(key), **case.tolerance)


def test_golden_points_to_boxes(case):
    keys = [key for key in case.arrays if key.startswith("out.points_to_boxes")]
    assert keys
    points, valid = case.tensor("in.points"), case.tensor("in.valid_mask")
    for key in keys:
        per_side, masked = re.fullmatch(r"out\.points_to_boxes_pps(\d+)(_masked)?", key).groups()
        used = valid if masked else torch.ones_like(valid)
        boxes = points_to_boxes(points, used, int(per_side))
        torch.testing.assert_close(boxes, case.tensor(key), **case.tolerance)


def test_golden_units(case):
    sizes = case.tensor("in.image_shape")
    points, boxes = case.tensor("in.points"), case.tensor("in.boxes")
    for ours, key in (
        (to_pixels(points / 300, sizes), "out.points_to_absolute"),
        (to_relative(points, sizes), "out.points_to_relative"),
        (to_relative(boxes, sizes), "out.boxes_to_relative"),
    ):
        torch.testing.assert_close(ours, case.tensor(key), **case.tolerance)


def test_a_box_survives_its_grid(generator):
    corner, extent = torch.rand(2, 5, 2, 2, generator=generator).unbind(-2)
    boxes = torch.cat([corner, corner + extent], dim=-1)
    for per_side in (0, 2, 3, 5):
        points = boxes_to_points(boxes, point_grid(per_side))
        valid = torch.ones(points.shape[:-1], dtype=torch.bool)
        torch.testing.assert_close(points_to_boxes(points, valid, per_side), boxes)
    sizes = torch.tensor([[30, 70], [20, 50]])
    torch.testing.assert_close(to_relative(to_pixels(boxes, sizes), sizes), boxes)


def test_boxes_from_points_carry_no_gradient():
    points = torch.rand(3, 4, 2, requires_grad=True)
    assert not points_to_boxes(points, torch.ones(3, 4, dtype=torch.bool)).requires_grad
