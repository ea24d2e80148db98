"""LBM, local bipartite matching: the distance between two traces of boxes.

Meng et al., "Connecting What to Say With Where to Look by Modeling Human Attention Traces",
CVPR 2021. Their linear programme is an assignment problem, and is solved as one here. Lower is
better. A trace has one box per word; words without a place are left out of the ground truth.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

SEGMENT = 20  # rows of the shorter trace matched at a time


def match(cost: ArrayLike, window: int) -> tuple[np.ndarray, float]:
    """Cheapest assignment of every row to a column of its own near its proportional place.

    Args:
        cost: float[p, m] with 1 <= p <= m.
        window: row i may take column j where (i - window) m / p <= j < (i + 1 + window) m / p.

    Returns:
        int[p], the column of each row, and the mean cost of a row.
    """
    cost = np.asarray(cost, np.float64)
    p, m = cost.shape
    if not 1 <= p <= m:
        raise ValueError(f"cost of shape {cost.shape}: expected 1 <= rows <= columns")
    if window < 0:
        raise ValueError(f"window {window}: expected 0 or more")
    row, column = np.arange(p)[:, None], np.arange(m)[None, :]
    ratio = m / p  # multiplied after rounding, as the original does: it decides ties at the border
    near = (column >= (row - window) * ratio) & (column < (row + 1 + window) * ratio)
    rows, columns = linear_sum_assignment(np.where(near, cost, np.inf))
    return columns, float(cost[rows, columns].mean())


def trace_distance(predicted: ArrayLike, target: ArrayLike, window: int = 0) -> float:
    """LBM where both traces may have any length (caption and trace predicted together).

    Args:
        predicted: float[P, 4], xyxy in [0, 1] of the image, finite; one row per predicted word.
        target: float[G, 4], or float[G, 5] with the area. Rows that are NaN, or whose area is
            exactly 1 (the corpus' mark (0, 0, 1, 1, 1)), stand for words without a place: they
            are removed. A real box around the whole image is removed with them.
        window: the k of LBM. The published joint protocol uses 0 only.

    Returns:
        Fraction of the image side; NaN where either trace has no row left, to be skipped by a
        mean (`numpy.nanmean`), as the original skips it.
    """
    predicted = _boxes(predicted, "predicted")
    if not np.isfinite(predicted).all():
        raise ValueError("predicted: a box is NaN or infinite; every predicted word needs a box")
    target = _placed(_boxes(target, "target", 5))
    if not len(predicted) or not len(target):
        return float("nan")
    shorter, longer = sorted((predicted, target), key=len)  # stable: predicted first when equal
    ratio = SEGMENT * len(longer) / len(shorter)
    pieces = []
    for index in range(math.ceil(len(shorter) / SEGMENT)):
        rows = shorter[index * SEGMENT : (index + 1) * SEGMENT]
        columns = longer[math.floor(index * ratio) : math.ceil((index + 1) * ratio)]
        cost = np.abs(rows[:, None] - columns[None]).mean(axis=-1)  # (p, m)
        pieces.append(match(cost, window)[1])
    return float(np.mean(pieces))


def trace_distance_given_caption(predicted: ArrayLike, target: ArrayLike, window: int = 0) -> float:
    """LBM where the words are given (controlled trace generation, or teacher forcing).

    As `trace_distance`, but both traces must have one row per word of the caption. Words without
    a place are removed from the target only, so its boxes may choose among predicted ones.
    """
    if len(predicted) != len(target):
        counts = f"{len(predicted)} predicted boxes for {len(target)} words"
        raise ValueError(f"{counts}; with a given caption every word has one row in both traces")
    return trace_distance(predicted, target, window)


def _boxes(rows: ArrayLike, name: str, max_width: int = 4) -> np.ndarray:
    boxes = np.asarray(rows, np.float64)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or not 4 <= boxes.shape[1] <= max_width:
        raise ValueError(f"{name} of shape {boxes.shape}: expected (rows, 4)")
    return boxes


def _placed(target: np.ndarray) -> np.ndarray:
    boxes = target[:, :4]
    area = target[:, 4] if target.shape[1] == 5 else np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return boxes[np.isfinite(boxes).all(axis=1) & (area != 1)]
