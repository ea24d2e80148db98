"""CenterNet's targets and losses on the cells of a feature pyramid (Zhou et al., 2019 and 2021).

PixelLLM's dense captioning, reference section 11. Every cell says whether an object's centre lies
in it and how far its box's sides are. Coordinates are pixels of the padded frame.

We differ in the stride that places the cells. The release gives level l the stride 2 ** l; at
384 px its 27 x 27 map then covers 432 px, a cell of 14.2 px counts as 16 px, and all targets,
boxes and crops are 12.5% off the features they are read from. Ours is the frame over the number
of cells by default; the release's numbers are an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

HEAT_OVERLAP = 0.8  # IoU with the object that a box shifted by the heat's radius still has
MIN_RADIUS_PX = 4.0
SIZE_RANGE = (2.0, 5.0)  # half diagonals of a level's objects in strides; the release's at 384 px


class Cells(NamedTuple):
    """All M cells of a pyramid, level by level and row by row.

    `centers_px` float32[M, 2], `strides` float32[M], and `size_ranges` float32[M, 2], the least
    and largest half diagonal in pixels of the objects that the cell's level is to find.
    """

    centers_px: Tensor
    strides: Tensor
    size_ranges: Tensor

    def boxes(self, ltrb: Tensor) -> Tensor:
        """Distances float[B, M, 4] to the left, top, right and bottom side, in strides, as xyxy."""
        distances = ltrb * self.strides[:, None]
        centers = self.centers_px.expand(len(ltrb), -1, -1)
        return torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)


def pyramid_cells(
    maps: Sequence[Tensor],
    strides: Sequence[float],
    size_ranges: Sequence[tuple[float, float]] | None = None,
) -> Cells:
    """The cells of maps [..., h, w], finest first.

    Args:
        maps: one per level; only their shapes and device count.
        strides: pixels per cell of every level.
        size_ranges: half diagonals in pixels of the objects of every level; by default 2 to 5
            strides, and no lower bound for the first and no upper one for the last level.
    """
    if size_ranges is None:
        low, high = SIZE_RANGE
        size_ranges = [(low * stride, high * stride) for stride in strides]
        size_ranges[0] = (0.0, size_ranges[0][1])
        size_ranges[-1] = (size_ranges[-1][0], torch.inf)
    levels = zip(maps, strides, size_ranges, strict=True)
    return Cells(*map(torch.cat, zip(*(_level(*level) for level in levels), strict=True)))


def _level(features: Tensor, stride: float, size_range: tuple[float, float]) -> Cells:
    h, w = features.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    centers = (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride
    count = len(centers)
    cells = Cells(centers, torch.full((count,), stride), torch.tensor(size_range).expand(count, 2))
    return Cells(*(part.to(features.device, torch.float32) for part in cells))


class CenterTargets(NamedTuple):
    """`heatmap` float32[B, M], 1 at the peaks alone; `ltrb` float32[B, M, 4], distances to the
    sides in strides, which count where `is_inside` bool[B, M]."""

    heatmap: Tensor
    ltrb: Tensor
    is_inside: Tensor


def center_targets(boxes_px: Tensor, valid: Tensor, cells: Cells) -> CenterTargets:
    """What the cells should say of B images.

    The cell of an object's centre is its peak on every level of its size. The 3 x 3 cells around
    regress its box where they lie inside; of several objects the nearest counts.

    Args:
        boxes_px: float32[B, K, 4], K at least 1.
        valid: bool[B, K]; boxes without an area never count.
        cells: of the pyramid.
    """
    start, end = boxes_px[:, None].split(2, dim=-1)  # (B, 1, K, 2)
    middle, extent = (start + end) / 2, end - start
    points, strides = cells.centers_px[:, None], cells.strides[:, None, None]  # (M, 1, 2 or 1)
    ltrb = torch.cat([points - start, end - points], dim=-1)  # (B, M, K, 4)
    low, high = cells.size_ranges[:, None].unbind(-1)  # (M, 1)
    half_diagonal = extent.norm(dim=-1) / 2  # (B, 1, K)
    valid = valid[:, None] & (extent > 0).all(-1)
    on_level = valid & (half_diagonal >= low) & (half_diagonal <= high)  # (B, M, K)
    steps = ((points / strides).floor() - (middle / strides).floor()).abs().amax(-1)
    is_peak = on_level & (steps == 0)
    is_inside = on_level & (steps <= 1) & (ltrb > 0).all(-1)

    shift = (1 - HEAT_OVERLAP) / (1 + HEAT_OVERLAP)
    squared_radius = (2 * shift**2 * extent.prod(-1)).clamp(min=MIN_RADIUS_PX**2)
    distance = (points - middle).square().sum(-1) / squared_radius  # (B, M, K)
    # Only a peak is exactly 1, however near other cells are.
    distance = distance.clamp(min=1e-6).masked_fill(is_peak, 0.0).masked_fill(~valid, torch.inf)
    nearest = distance.masked_fill(~is_inside, torch.inf).argmin(-1)  # (B, M)
    index = nearest[..., None, None].expand(-1, -1, 1, 4)
    ltrb = ltrb.gather(2, index)[:, :, 0] / cells.strides[:, None]
    return CenterTargets((-distance).exp().amax(-1), ltrb, is_inside.any(-1))


class CenterLosses(NamedTuple):
    """Float32 scalars: focal losses of the peaks and of all other cells, and that of the boxes."""

    positive: Tensor
    negative: Tensor
    giou: Tensor


def center_losses(
    logits: Tensor,
    ltrb: Tensor,
    targets: CenterTargets,
    alpha: float = 0.25,
    beta: float = 4.0,
    gamma: float = 2.0,
) -> CenterLosses:
    """CenterNet's focal loss and generalised IoU, over the numbers of peaks and of box cells.

    Args:
        logits: float[B, M] of the heat map.
        ltrb: float[B, M, 4], not negative, in strides.
        targets: of the same cells.
        alpha: share of the peaks.
        beta: spares cells near a peak, by (1 - heat) ** beta.
        gamma: spares cells that are right already.
    """
    p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    is_peak = targets.heatmap == 1
    positive = (p.log() * (1 - p) ** gamma)[is_peak].sum() / _count(is_peak)
    spared = (1 - targets.heatmap) ** beta
    negative = ((1 - p).log() * p**gamma * spared).sum() / _count(is_peak)
    inside = targets.is_inside
    errors = generalized_box_iou_loss(
        _around_zero(ltrb.float()[inside]), _around_zero(targets.ltrb[inside]), eps=1e-6
    )
    giou = errors.sum() / _count(inside)
    return CenterLosses(-alpha * positive, -(1 - alpha) * negative, giou)


def _count(mask: Tensor) -> Tensor:
    """Cells of all images; one without any counts as one."""
    return mask.sum(1).clamp(min=1).sum()


def _around_zero(ltrb: Tensor) -> Tensor:
    return torch.cat([-ltrb[..., :2], ltrb[..., 2:]], dim=-1)
