"""CenterNet2's second stage: is it an object, and where exactly (PixelLLM reference, 11.5).

One stage as in PixelLLM, or a cascade (Cai and Vasconcelos, 2018) in which each refines the boxes
of the one before and demands more overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from pixelllm.detection import (
    box_areas,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    match,
    take_rows,
)

POOL_SIZE = 7
CELLS_PER_SIDE = 14  # a box is read from the coarsest level on which it spans this many cells


def crop_features(
    levels: Sequence[Tensor], strides: Sequence[float], boxes_px: Tensor, size: int = POOL_SIZE
) -> Tensor:
    """RoIAlign on the level that suits each box's size, with zeros beyond the maps.

    Args:
        levels: float32[B, C, h, w], finest first.
        strides: pixels per cell of the levels, increasing.
        boxes_px: float32[B, S, 4].

    Returns:
        float32[B * S, C, size, size].
    """
    B, S, _ = boxes_px.shape
    images = torch.arange(B, device=boxes_px.device).repeat_interleave(S)
    side = box_areas(boxes_px).sqrt().flatten()
    suiting = torch.bucketize(side / CELLS_PER_SIDE, side.new_tensor(strides), right=True) - 1
    crops = levels[0].new_zeros(B * S, levels[0].shape[1], size, size)
    for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = (suiting.clamp(min=0) == number).nonzero()[:, 0]
        # torchvision repeats the border for one cell; behind a frame of zeros it does not.
        shifted = boxes_px.flatten(0, 1)[rows] + stride
        rois = torch.cat([images[rows, None], shifted], dim=1)
        padded = F.pad(level, (1, 1, 1, 1))
        found = roi_align(padded, rois, size, 1 / stride, sampling_ratio=2, aligned=True)
        crops = crops.index_copy(0, rows, found)
    return crops


class BoxHead(nn.Module):
    """Fully connected layers on a crop, then two logits (background, object) and box deltas.

    Args:
        channels: of the crops.
        widths: of the hidden layers.
        sigmoid: the logits are independent; they begin at 1%.
        box_layer: one more hidden layer before the deltas.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], sigmoid: bool = False, box_layer: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = (channels * POOL_SIZE**2, *widths[:-1])
        for before, after in zip(inputs, widths, strict=True):
            layers += [_linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        width = widths[-1]
        self.object = nn.Linear(width, 2)
        before_deltas = [_linear(width, width), nn.ReLU()] if box_layer else []
        self.deltas = nn.Sequential(*before_deltas, nn.Linear(width, 4))
        nn.init.normal_(self.object.weight, std=0.01)
        nn.init.constant_(self.object.bias, -4.6 if sigmoid else 0.0)
        nn.init.normal_(self.deltas[-1].weight, std=0.001)
        nn.init.zeros_(self.deltas[-1].bias)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """float[R, C, 7, 7] -> logits float[R, 2] and deltas float[R, 4]."""
        hidden = self.layers(crops)
        return self.object(hidden), self.deltas(hidden)


def _linear(before: int, after: int) -> nn.Linear:
    layer = nn.Linear(before, after)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.zeros_(layer.bias)
    return layer


class Stage(NamedTuple):
    """What one stage says of its `proposals_px` float32[B, S, 4]: `logits` float[B, S, 2] and
    `deltas` float[B, S, 4]."""

    proposals_px: Tensor
    logits: Tensor
    deltas: Tensor


class RoiHeads(nn.Module):
    """A cascade of box heads, by default of one.

    Args:
        channels: of the levels.
        widths: of the hidden layers of every head.
        min_ious: overlap with an object that makes a proposal one, per stage.
        sigmoid, box_layer: as in `BoxHead`.
    """

    def __init__(
        self,
        channels: int = 256,
        widths: Sequence[int] = (1024, 1024),
        min_ious: Sequence[float] = (0.6,),
        sigmoid: bool = False,
        box_layer: bool = False,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(BoxHead(channels, widths, sigmoid, box_layer) for _ in min_ious)
        self.min_ious = tuple(min_ious)
        self.weights = [10.0 * (k + 1) for k in range(len(min_ious))]  # of the deltas
        self.sigmoid = sigmoid

    def forward(
        self,
        levels: Sequence[Tensor],
        strides: Sequence[float],
        proposals_px: Tensor,
        sizes: Tensor,
    ) -> list[Stage]:
        """All stages on proposals float32[B, S, 4] inside images of `sizes` int64[B, 2]."""
        stages = []
        for head, weight in zip(self.heads, self.weights, strict=True):
            outputs = head(crop_features(levels, strides, proposals_px))
            logits, deltas = (output.unflatten(0, proposals_px.shape[:2]) for output in outputs)
            stages.append(Stage(proposals_px, logits, deltas))
            # A gradient through the boxes of the next stage would diverge.
            refined = decode_deltas(deltas.detach(), proposals_px, weight)
            proposals_px = clip_boxes(refined, sizes)
        return stages

    def detections(self, stages: list[Stage], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes float32[B, S, 4] of the last stage and the mean probability over all, [B, S]."""
        proposals_px, _, deltas = stages[-1]
        boxes = clip_boxes(decode_deltas(deltas, proposals_px, self.weights[-1]), sizes)
        logits = torch.stack([stage.logits for stage in stages])
        probabilities = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        return boxes, probabilities[..., 1].mean(0)

    def losses(self, stages: list[Stage], boxes_px: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the stages of the classification and of the L1 loss, float32 scalars.

        Args:
            stages: of `forward`; proposals without an area do not count.
            boxes_px: float32[B, K, 4], ground truth; `valid` bool[B, K].
        """
        terms = []
        for stage, min_iou, weight in zip(stages, self.min_ious, self.weights, strict=True):
            index, is_object = match(stage.proposals_px, boxes_px, valid, min_iou)
            classes = self._class_loss(stage.logits, is_object, box_areas(stage.proposals_px) > 0)
            boxes = take_rows(boxes_px, index)[is_object]
            targets = encode_deltas(boxes, stage.proposals_px[is_object], weight)
            distance = (stage.deltas[is_object] - targets).abs().sum()
            terms.append(torch.stack([classes, distance / is_object.numel()]))
        return tuple(torch.stack(terms).mean(0))

    def _class_loss(self, logits: Tensor, is_object: Tensor, counts: Tensor) -> Tensor:
        if self.sigmoid:
            targets = F.one_hot(is_object.long(), 2).to(logits)
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
            return (losses * counts).mean()
        losses = F.cross_entropy(logits.mT, is_object.long(), reduction="none")
        return (losses * counts).sum() / counts.sum().clamp(min=1)
