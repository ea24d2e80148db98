"""Referring expressions: how well one box, and one mask, per expression fit (reference, §12.2).

The official evaluation scores the first 16 expressions of an image; here every one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as coco_mask

from pixelllm.evaluation.overlap import box_iou, check_same_ids, checked_boxes
from pixelllm.mask_codes import checked_mask

Mask = Mapping[str, Any] | np.ndarray  # COCO run lengths, or bool[H, W]
_UNION_GUARD = 1e-5  # pixels, the official guard of the quotients, kept for equal numbers


def score_referred_boxes(
    predictions: Mapping[str, ArrayLike], truths: Mapping[str, ArrayLike], threshold: float = 0.5
) -> dict[str, float]:
    """Precision of the one box of each expression.

    Args:
        predictions: xyxy in [0, 1] of the image, by expression; clipped to the image first.
        truths: the same of the ground truth, for the same expressions (else ValueError).

    Returns:
        `box_precision`, the share of expressions whose IoU is **above** the threshold, and
        `box_iou`, their mean IoU.
    """
    check_same_ids(predictions, truths, "expressions")
    found = [_box(predictions, key).clip(0, 1) for key in truths]
    iou = box_iou(found, [_box(truths, key) for key in truths])
    return {"box_precision": float((iou > threshold).mean()), "box_iou": float(iou.mean())}


def score_referred_masks(
    predictions: Mapping[str, Mask],
    truths: Mapping[str, Mask],
    truth_boxes: Mapping[str, ArrayLike],
    threshold: float = 0.5,
    empty_iou: float = 0.0,
) -> dict[str, float]:
    """How well the one mask of each expression fits.

    Args:
        predictions: masks of the image's own size (H, W), by expression: bool arrays, or COCO run
            lengths `{"size": [H, W], "counts": ...}`.
        truths: the same of the ground truth, for the same expressions and of the same sizes.
        truth_boxes: ground-truth boxes, xyxy in [0, 1] of the image.
        empty_iou: what two empty masks score; PerceptionGPT counts 1.

    Returns:
        `mask_ciou`, intersections of all expressions by their unions (large objects weigh more);
        `mask_giou`, the mean IoU; `mask_precision`, the share with an IoU above the threshold;
        `mask_box_precision`, `box_precision` of the tight boxes of the predicted masks.

    Raises ValueError on ids of one side only, and on a mask of another size than its truth.
    """
    check_same_ids(predictions, truths, "expressions")
    common, union, boxes = [], [], {}
    for key in truths:
        found, truth = _run_lengths(predictions[key], key), _run_lengths(truths[key], key)
        (height, width), size = found["size"], truth["size"]
        if (height, width) != tuple(size):
            expected = f"resize it to the {tuple(size)} of its ground truth"
            raise ValueError(f"{key}: predicted mask of size {height, width}; {expected}")
        common.append(_area(coco_mask.merge([found, truth], intersect=True)))
        union.append(_area(found) + _area(truth) - common[-1])
        x, y, w, h = coco_mask.toBbox(found)
        boxes[key] = [x / width, y / height, (x + w) / width, (y + h) / height]
    common, union = np.array(common), np.array(union)
    iou = np.where(union > 0, common / (union + _UNION_GUARD), empty_iou)
    return {
        "mask_ciou": float(common.mean() / (union.mean() + _UNION_GUARD)),
        "mask_giou": float(iou.mean()),
        "mask_precision": float((iou > threshold).mean()),
        "mask_box_precision": score_referred_boxes(boxes, truth_boxes, threshold)["box_precision"],
    }


def _box(boxes: Mapping[str, ArrayLike], key: str) -> np.ndarray:
    return checked_boxes([boxes[key]], key)[0]


def _run_lengths(mask: Mask, key: str) -> dict[str, Any]:
    """Compressed run lengths of a mask in any of its forms."""
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"{key}: mask {mask.dtype}{list(mask.shape)}; expected bool[H, W]")
        return coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return checked_mask(mask, key)


def _area(mask: dict[str, Any]) -> float:
    return float(coco_mask.area(mask))
