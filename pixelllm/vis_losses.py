"""PerceptionGPT's losses on answers and on the boxes and masks of their `<vis>`, in float32.

Reference, section 4; all weights are 1. Nothing to score gives 0. Differences: boxes are read as
corners, and Dice is a mean over masks; what the release computes is an option of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from pixelllm.boxes import order_corners
from pixelllm.losses import dice_loss
from pixelllm.models.perceptiongpt import Objects, Perception, Tokens
from pixelllm.models.vis_masks import resize_logits

EMPTY = 1e-6  # added to both sides of Dice's quotient: two empty masks agree


class BoxLoss(NamedTuple):
    """Float32 scalars: `l1` per coordinate, and one minus the generalised IoU."""

    l1: Tensor
    giou: Tensor


class VisMaskLoss(NamedTuple):
    """Float32 scalars: binary cross-entropy per pixel, and one minus the Dice coefficient."""

    bce: Tensor
    dice: Tensor


def answer_loss(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens: float[A, V], int64[A] -> scalar."""
    total = F.cross_entropy(logits.float(), token_ids, reduction="sum")
    return total / max(len(token_ids), 1)


def box_loss(boxes: Tensor, targets: Tensor, centre_reading: bool = False) -> BoxLoss:
    """How far predicted boxes are from the true ones.

    Args:
        boxes: float[n, 4], in [0, 1]; their corners may come in any order.
        targets: float[n, 4], xyxy in [0, 1].
        centre_reading: read the corners of both as centre and size for the IoU, as the release
            does; the optimum is the same.
    """
    boxes, targets = boxes.float(), targets.float()
    l1 = (boxes - targets).abs().sum() / max(boxes.numel(), 1)
    if centre_reading:
        boxes, targets = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, targets))
    giou = generalized_box_iou_loss(order_corners(boxes), order_corners(targets), reduction="sum")
    return BoxLoss(l1, giou / max(len(targets), 1))


def vis_mask_loss(logits: Tensor, targets: Tensor, whole_batch: bool = False) -> VisMaskLoss:
    """How far predicted masks are from the true ones.

    Args:
        logits: float[n, h, w], resized bilinearly to H x W.
        targets: float[n, H, W] in [0, 1], soft edges included.
        whole_batch: one Dice of all masks together, as in the release, where large objects
            outweigh small ones; otherwise their mean.
    """
    logits, targets = resize_logits(logits, tuple(targets.shape[1:])), targets.float()
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    bce = bce / max(targets.numel(), 1)
    dims = (0, 1, 2) if whole_batch else (1, 2)
    dice = dice_loss(logits, targets, dims, EMPTY)
    return VisMaskLoss(bce, dice if whole_batch else dice.sum() / max(len(targets), 1))


def perception_losses(
    prediction: Perception,
    tokens: Tokens,
    objects: Objects,
    centre_reading: bool = False,
    whole_batch: bool = False,
) -> dict[str, Tensor]:
    """All terms of a batch by name: "text", "l1", "giou", "bce" and "dice".

    Args:
        prediction: of these tokens and objects.
        centre_reading: as in `box_loss`.
        whole_batch: as in `vis_mask_loss`.
    """
    is_target = prediction.is_target
    targets = objects.masks[is_target[objects.has_mask]]
    return {
        "text": answer_loss(prediction.logits, tokens.token_ids[tokens.is_answer]),
        **box_loss(prediction.boxes, objects.boxes[is_target], centre_reading)._asdict(),
        **vis_mask_loss(prediction.masks, targets, whole_batch)._asdict(),
    }
