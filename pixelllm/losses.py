"""Losses on words, points and masks, as pure functions in float32. Official `losses.py`.

A batch without anything valid gives 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def text_loss(
    logits: Tensor,
    token_ids: Tensor,
    row_valid: Tensor,
    pad_id: int,
    eos_id: int,
    smoothing: float = 0.1,
) -> Tensor:
    """Label-smoothed cross-entropy of the next word, one mean over all valid words.

    Args:
        logits: float[R, T, V]; those at t score word t + 1.
        token_ids: int64[R, T], BOS first.
        row_valid: bool[R]; rows of sources without a text loss are False.
        pad_id: targets that do not count.
        eos_id: a row whose first target is EOS is empty and does not count.
        smoothing: probability spread over the V - 1 other words.
    """
    targets = token_ids[:, 1:]
    valid = (targets != pad_id) & row_valid[:, None].bool() & (targets[:, :1] != eos_id)
    V = logits.shape[-1]
    # torch spreads its smoothing over all V words, the official code over V - 1.
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten(),
        reduction="none",
        label_smoothing=smoothing * V / (V - 1),
    )
    return _masked_mean(losses, valid.flatten())


def point_loss(
    points: Tensor,
    targets: Tensor,
    valid: Tensor,
    kind: Literal["l1", "l2", "l1_nonzero"] = "l1_nonzero",
) -> Tensor:
    """Mean distance per coordinate over the valid words, in the unit of the points.

    Args:
        points: float[..., T, P, 2].
        targets: float[..., T, P, 2].
        valid: bool[..., T], or float weights of the words.
        kind: "l1_nonzero" also drops words whose targets are all 0, which means "nowhere".
    """
    points, targets = points.float(), targets.float()
    error = (points - targets).square() if kind == "l2" else (points - targets).abs()
    if kind == "l1_nonzero":
        valid = valid & (targets != 0).any(-1).any(-1)
    return _masked_mean(error.mean((-1, -2)), valid)


class MaskLoss(NamedTuple):
    """Terms of `mask_loss`, weighted, float32 scalars; `total` is their sum."""

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou: Tensor


def mask_loss(
    mask_logits: Tensor,
    iou_predictions: Tensor,
    masks: Tensor,
    valid: Tensor,
    padding: Tensor,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
    focal_alpha: float = 0.5,
    focal_gamma: float = 2.0,
) -> MaskLoss:
    """SAM's loss (its appendix A): focal and dice of the best of M masks, and the IoU head's.

    SAM itself uses `focal_alpha` 0.25; 0.5 is what the official PixelLLM used.

    Args:
        mask_logits: float[B, K, M, h, w], resized bilinearly to H x W.
        iou_predictions: float[B, K, M].
        masks: [B, K, H, W], foreground where > 0.
        valid: bool[B, K], prompts that count.
        padding: bool[B, H, W], pixels outside the image; focal alone ignores them.
    """
    logits = F.interpolate(
        mask_logits.float().flatten(0, 1), masks.shape[-2:], mode="bilinear", antialias=True
    ).unflatten(0, mask_logits.shape[:2])  # (B, K, M, H, W)
    masks = (masks > 0).float()[:, :, None]
    inside = ~padding[:, None, None]
    focal = _focal(logits, masks, focal_alpha, focal_gamma) * inside
    focal = focal.sum((-1, -2)) / inside.sum((-1, -2)).clamp(min=1)  # (B, K, M)
    dice = dice_loss(logits, masks, (-1, -2), smooth=1.0)
    focal, dice = focal_weight * focal, dice_weight * dice
    best = (focal + dice).argmin(-1, keepdim=True)
    focal = _masked_mean(focal.gather(-1, best)[..., 0], valid)
    dice = _masked_mean(dice.gather(-1, best)[..., 0], valid)
    iou_error = (iou_predictions.float() - mask_iou(logits > 0, masks > 0)).square().mean(-1)
    iou = iou_weight * _masked_mean(iou_error, valid)
    return MaskLoss(focal + dice + iou, focal, dice, iou)


def mask_iou(predicted: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of bool[..., H, W] masks, float32[...]; 0 where both are empty."""
    intersection = (predicted & masks).sum((-1, -2))
    return intersection / (predicted | masks).sum((-1, -2)).clamp(min=1)


def token_mask(token_ids: Tensor, exclude: str, bos_id: int, eos_id: int, pad_id: int) -> Tensor:
    """Words that carry a point, by the official mini-language.

    Args:
        token_ids: int64[..., T].
        exclude: comma-separated names of what to drop: "pad", "begin", "end", "end-1" (the word
            before EOS), "text" (ordinary words). A leading "^" inverts the result.

    Returns:
        bool[..., T], True where the word counts.
    """
    is_begin, is_end, is_pad = token_ids == bos_id, token_ids == eos_id, token_ids == pad_id
    kinds = {
        "pad": is_pad,
        "begin": is_begin,
        "end": is_end,
        "end-1": F.pad(is_end[..., 1:], (0, 1), value=False),
        "text": ~(is_begin | is_end | is_pad),
    }
    dropped = torch.zeros_like(is_pad)
    for name in filter(None, exclude.removeprefix("^").split(",")):
        if name not in kinds:
            raise ValueError(
                f"{name!r} is not a kind of token; there are {', '.join(sorted(kinds))}"
            )
        dropped |= kinds[name]
    return dropped if exclude.startswith("^") else ~dropped


def dice_loss(logits: Tensor, masks: Tensor, dims: tuple[int, ...], smooth: float) -> Tensor:
    """1 - (2 * overlap + smooth) / (areas + smooth), areas being summed over `dims`."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * masks).sum(dims)
    areas = probabilities.sum(dims) + masks.sum(dims)
    return 1 - (2 * overlap + smooth) / (areas + smooth)


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    valid = valid.to(values.dtype)
    return (values * valid).sum() / valid.sum().clamp(min=1)


def _focal(logits: Tensor, masks: Tensor, alpha: float, gamma: float) -> Tensor:
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits, masks.expand_as(logits), reduction="none"
    )
    missed = (logits.sigmoid() - masks).abs()  # 1 - probability of the truth
    weight = alpha * masks + (1 - alpha) * (1 - masks)
    return weight * missed**gamma * cross_entropy
