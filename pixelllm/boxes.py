"""Boxes from points and back, and their units.

Boxes are xyxy, points (x, y), sizes (H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor


def point_grid(points_per_side: int, centered: bool = True) -> Tensor:
    """A regular grid in the unit square, row by row.

    Args:
        points_per_side: below 1, the two corners (0, 0) and (1, 1) instead of a grid.
        centered: points at the centres of the cells, otherwise from border to border.

    Returns:
        float32[P, 2].
    """
    if points_per_side < 1:
        return torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    if centered:
        ticks = (torch.arange(points_per_side) + 0.5) / points_per_side
    else:
        ticks = torch.linspace(0, 1, points_per_side)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def boxes_to_points(boxes: Tensor, grid: Tensor) -> Tensor:
    """Lay a grid float[P, 2] of the unit square into boxes float[..., 4]: float[..., P, 2]."""
    start, end = boxes[..., None, :2], boxes[..., None, 2:]
    return start + grid.to(boxes) * (end - start)


def points_to_boxes(points: Tensor, valid: Tensor, points_per_side: int = 0) -> Tensor:
    """The smallest box around the valid points; it carries no gradient.

    Args:
        points: float[..., P, 2].
        valid: bool[..., P].
        points_per_side: above 1, the points are a centred grid of that many, and the box grows
            by half a cell on each side to the one the grid was laid into.

    Returns:
        float[..., 4]. Where no point is valid the box is inverted (x0 > x1), as in the official
        code: from one above the largest to one below the smallest coordinate.
    """
    points, invalid = points.detach(), ~valid[..., None]
    low = points.masked_fill(invalid, torch.inf).amin(-2)
    high = points.masked_fill(invalid, -torch.inf).amax(-2)
    low = torch.where(low.isinf(), points.amax(-2) + 1, low)
    high = torch.where(high.isinf(), points.amin(-2) - 1, high)
    if points_per_side > 1:
        margin = (high - low) / (points_per_side - 1) / 2
        low, high = low - margin, high + margin
    return torch.cat([low, high], dim=-1)


def order_corners(boxes: Tensor) -> Tensor:
    """float[..., 4] of any two opposite corners, as xyxy."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)


def to_pixels(coordinates: Tensor, sizes: Tensor) -> Tensor:
    """Points float[B, ..., 2] or boxes float[B, ..., 4] relative to images of sizes [B, 2]."""
    return coordinates * _extent(coordinates, sizes)


def to_relative(coordinates: Tensor, sizes: Tensor) -> Tensor:
    """The inverse of `to_pixels`."""
    return coordinates / _extent(coordinates, sizes)


def _extent(coordinates: Tensor, sizes: Tensor) -> Tensor:
    """(W, H) or (W, H, W, H) of each image, with as many axes as the coordinates."""
    extent = sizes.flip(-1).tile(coordinates.shape[-1] // 2).to(coordinates)
    return extent.view(len(sizes), *[1] * (coordinates.ndim - 2), -1)
