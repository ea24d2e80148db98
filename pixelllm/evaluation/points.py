"""Point L1: how far the predicted point of a token lies from its piece of trace.

The official trace evaluator (reference §12.1). It compares token by token, so predictions must
come from the ground-truth words (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


def trace_l1(points: ArrayLike, targets: ArrayLike, valid: ArrayLike) -> float:
    """Error of one image: every caption of it pooled into one mean over tokens.

    For each predicted point the nearest target point of its token counts, at the mean of |dx| and
    |dy|; then the mean over the token's points, then over tokens.

    Args:
        points: float[..., T, P, 2] or float[..., T, 2], (x, y) in [0, 1] of the image; finite at
            tokens that count.
        targets: float[..., T, G, 2] in the same units. A token whose targets are NaN or nowhere
            above zero points nowhere and does not count.
        valid: bool[..., T], False on padding and on tokens to leave out.

    Returns:
        Fraction of the image side; 0.0 where no token counts, as in the official evaluator.
    """
    points, targets = np.asarray(points, np.float64), np.asarray(targets, np.float64)
    valid = np.asarray(valid, bool)
    if points.ndim == targets.ndim - 1:
        points = points[..., None, :]
    _check_shapes(points, targets, valid)
    valid = valid & (targets.max(axis=(-1, -2)) > 0)  # NaN compares as False
    if not valid.any():
        return 0.0
    points, targets = points[valid], targets[valid]  # (M, P, 2), (M, G, 2)
    if not np.isfinite(points).all():
        raise ValueError("points: a token that counts has a NaN or infinite predicted point")
    distance = np.abs(points[:, :, None] - targets[:, None]).mean(axis=-1)  # (M, P, G)
    per_token = distance.min(axis=-1).mean(axis=-1)
    # 1e-8 is the official guard of the quotient, kept for equal numbers.
    return float(per_token.sum() / (valid.sum() + 1e-8))


def mean_trace_l1(images: Iterable[tuple[ArrayLike, ArrayLike, ArrayLike]]) -> float:
    """Mean of `trace_l1` over the (points, targets, valid) of every image; NaN without images."""
    errors = [trace_l1(points, targets, valid) for points, targets, valid in images]
    return float(np.mean(errors)) if errors else float("nan")


def _check_shapes(points: np.ndarray, targets: np.ndarray, valid: np.ndarray) -> None:
    fits = (
        points.ndim >= 3
        and points.shape[-1] == targets.shape[-1] == 2
        and points.shape[:-2] == targets.shape[:-2] == valid.shape
        and min(points.shape[-2], targets.shape[-2]) > 0
    )
    if not fits:
        raise ValueError(
            f"points {points.shape}, targets {targets.shape} and valid {valid.shape} do not fit: "
            "expected [..., T, P, 2], [..., T, G, 2] and [..., T]"
        )
