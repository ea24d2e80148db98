"""PixelLLM's class-agnostic object detector, CenterNet2 (Zhou et al., 2021) on its own features.

Official `box_decoder.py`. For dense captioning its detections, or in training sampled proposals,
become location prompts. How our cells differ from the release's is in `pixelllm.centers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelllm.centers import Cells, center_losses, center_targets, pyramid_cells
from pixelllm.detection import (
    ScoredBoxes,
    clip_boxes,
    match,
    sample_proposals,
    suppress,
    take_rows,
)
from pixelllm.models.centernet import CenterNetHead, Heat, SimplePyramid
from pixelllm.models.roi_heads import RoiHeads


class DetectorLosses(NamedTuple):
    """Float32 scalars: the terms as they are, and their weighted sum `total`."""

    total: Tensor
    heatmap_pos: Tensor
    heatmap_neg: Tensor
    giou: Tensor
    roi_cls: Tensor
    roi_reg: Tensor


class DetectorOutput(NamedTuple):
    """Losses, and the proposals that trained the second stage, for the language model.

    `proposals_px` float32[B, S, 4] carry no gradient; objects come first, and within them the
    likelier ones; zeros are padding. `object_index` int64[B, S] is the ground truth that each
    overlaps most, which means something where `is_object` bool[B, S].
    """

    losses: DetectorLosses
    proposals_px: Tensor
    object_index: Tensor
    is_object: Tensor


class Detector(nn.Module):
    """Proposals from the dense first stage, judged and refined by the second; all in float32.

    Args:
        pyramid, head, roi_heads: the parts.
        frame: side in pixels of the square that the features cover.
        strides: pixels per cell of the levels; None: the true ones, frame / size of the map.
            The release's are 8, 16, 32, ... whatever the maps.
        size_ranges: as in `pyramid_cells`; by default they follow the strides.
        heat_weight, giou_weight: of the first stage's losses in the total.
        train_limits, test_limits: cells that are decoded, and proposals that remain of them.
        proposal_iou: proposals that overlap a likelier one by this much go.
        num_samples, positive_fraction: proposals per image that train the second stage, and the
            quota of objects among them.
        min_score, detection_iou: detections below, or overlapping a better one by this much, go.
    """

    def __init__(
        self,
        pyramid: SimplePyramid,
        head: CenterNetHead,
        roi_heads: RoiHeads,
        frame: int,
        *,
        strides: Sequence[float] | None = None,
        size_ranges: Sequence[tuple[float, float]] | None = None,
        heat_weight: float = 0.5,
        giou_weight: float = 1.0,
        train_limits: tuple[int, int] = (2000, 1000),
        test_limits: tuple[int, int] = (1000, 256),
        proposal_iou: float = 0.9,
        num_samples: int = 512,
        positive_fraction: float = 0.25,
        min_score: float = 0.05,
        detection_iou: float = 0.5,
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = head
        self.roi_heads = roi_heads
        self.frame = frame
        self.strides = strides
        self.size_ranges = size_ranges
        self.heat_weight, self.giou_weight = heat_weight, giou_weight
        self.train_limits, self.test_limits = train_limits, test_limits
        self.proposal_iou = proposal_iou
        self.num_samples, self.positive_fraction = num_samples, positive_fraction
        self.min_score, self.detection_iou = min_score, detection_iou

    def forward(
        self,
        features: Tensor,
        sizes: Tensor,
        boxes_px: Tensor,
        valid: Tensor,
        generator: torch.Generator | None = None,
    ) -> DetectorOutput:
        """Losses and sampled proposals of B images; an image may be without any object.

        Args:
            features: float[B, C, h, w] of the whole frame.
            sizes: int64[B, 2], (H, W) in pixels that proposals are clipped to.
            boxes_px: float32[B, K, 4], the objects, K at least 1.
            valid: bool[B, K].
            generator: of the sampling.
        """
        with torch.autocast(features.device.type, enabled=False):
            boxes_px = boxes_px.float() * valid[..., None]
            levels, strides, cells, heat = self.scan(features)
            dense = center_losses(*heat, center_targets(boxes_px, valid, cells))
            proposals_px, _ = self.propose(heat, cells, sizes, self.train_limits)
            candidates = torch.cat([proposals_px, boxes_px], dim=1)
            min_iou = self.roi_heads.min_ious[0]
            samples = sample_proposals(
                candidates,
                match(candidates, boxes_px, valid, min_iou).is_object,
                self.num_samples,
                self.positive_fraction,
                generator,
            )
            stages = self.roi_heads(levels, strides, samples, sizes)
            roi_cls, roi_reg = self.roi_heads.losses(stages, boxes_px, valid)
        heatmap = self.heat_weight * (dense.positive + dense.negative)
        total = heatmap + self.giou_weight * dense.giou + roi_cls + roi_reg
        proposals_px = stages[-1].proposals_px
        return DetectorOutput(
            DetectorLosses(total, *dense, roi_cls, roi_reg),
            proposals_px,
            *match(proposals_px, boxes_px, valid, min_iou),
        )

    @torch.no_grad()
    def detect(self, features: Tensor, sizes: Tensor, max_detections: int = 100) -> ScoredBoxes:
        """The M = `max_detections` best objects, their boxes clipped to the images.

        Args:
            features: float[B, C, h, w] of the whole frame.
            sizes: int64[B, 2], (H, W) in pixels; the release clips to the frame.
        """
        with torch.autocast(features.device.type, enabled=False):
            levels, strides, cells, heat = self.scan(features)
            proposals_px, proposal_scores = self.propose(heat, cells, sizes, self.test_limits)
            stages = self.roi_heads(levels, strides, proposals_px, sizes)
            boxes_px, probabilities = self.roi_heads.detections(stages, sizes)
        scores = (probabilities * proposal_scores).sqrt()
        scores = scores.masked_fill(scores <= self.min_score, 0.0)
        boxes_px, scores = suppress(boxes_px, scores, self.detection_iou, max_detections)
        missing = max_detections - scores.shape[1]
        return ScoredBoxes(F.pad(boxes_px, (0, 0, 0, missing)), F.pad(scores, (0, missing)))

    def scan(self, features: Tensor) -> tuple[list[Tensor], Sequence[float], Cells, Heat]:
        """Levels of the pyramid, their strides, their cells, and what the first stage says."""
        levels = self.pyramid(features.float())
        strides = self.strides or [self.frame / level.shape[-1] for level in levels]
        return levels, strides, pyramid_cells(levels, strides, self.size_ranges), self.head(levels)

    @torch.no_grad()
    def propose(
        self, heat: Heat, cells: Cells, sizes: Tensor, limits: tuple[int, int]
    ) -> ScoredBoxes:
        """The likeliest cells as boxes without near duplicates, clipped; `limits` bounds both."""
        num_cells, num_proposals = limits
        scores, index = heat.logits.sigmoid().topk(min(num_cells, heat.logits.shape[1]))
        boxes_px = take_rows(cells.boxes(heat.ltrb), index)
        boxes_px, scores = suppress(boxes_px, scores, self.proposal_iou, num_proposals)
        return ScoredBoxes(clip_boxes(boxes_px, sizes), scores)
