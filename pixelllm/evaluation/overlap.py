"""Intersection over union of boxes, and the checks that the scores of places share.

NumPy only: scoring saved predictions needs no model library.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import ArrayLike


def box_iou(boxes: ArrayLike, others: ArrayLike) -> np.ndarray:
    """IoU of float[..., 4] with float[..., 4], broadcast; xyxy, both in the same unit.

    Rounded to six decimals, so that boxes which overlap by exactly a threshold do so in fractions
    of the image as in pixels. An empty or inverted box overlaps nothing.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    common = _area(low, high)
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - common
    return np.round(common / np.where(union > 0, union, 1.0), 6)


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (high - low).clip(0).prod(-1)


def checked_boxes(boxes: ArrayLike, name: str) -> np.ndarray:
    """float64[N, 4] of finite boxes in fractions of the image; ValueError that names the item.

    Boxes may stick out of the image, as some of Visual Genome do, but not by more than its size.
    """
    array = np.asarray(boxes, np.float64)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"{name}: boxes of shape {array.shape}; expected (boxes, 4)")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: a box is NaN or infinite")
    if not (np.abs(array) <= 2).all():
        worst = array[np.abs(array).max(axis=1).argmax()].tolist()
        raise ValueError(f"{name}: box {worst} is not in [0, 1]; divide pixels by the image's size")
    return array


def check_same_ids(predictions: Mapping, truths: Mapping, noun: str) -> None:
    """Refuse nothing to score, and ids of one side only."""
    if not predictions and not truths:
        raise ValueError(f"no {noun} to score")
    for name, ids in (
        ("a prediction", truths.keys() - predictions.keys()),
        ("ground truth", predictions.keys() - truths.keys()),
    ):
        if ids:
            raise ValueError(f"{len(ids)} {noun} without {name}: {_shown(ids)}")


def _shown(ids: set[Hashable]) -> str:
    return ", ".join(sorted(map(str, ids))[:5]) + " ..." * (len(ids) > 5)
