"""Boxes as proposals: matching, sampling, suppression, deltas, and the scores of the captioned.

The pure half of CenterNet2's second stage (Zhou et al., 2021; PixelLLM reference, sections 10 and
11). Boxes are xyxy in pixels, float32; a box of zeros is padding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou, nms

MAX_GROWTH = math.log(1000 / 16)  # of a side through a delta; larger ones overflow early on


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows [B, k, ...] of [B, n, ...] by int64[B, k]."""
    return values[torch.arange(len(index), device=index.device)[:, None], index]


def clip_boxes(boxes_px: Tensor, sizes: Tensor) -> Tensor:
    """Boxes float[B, k, 4] inside images of sizes (H, W) [B, 2]."""
    extent = sizes.flip(-1).tile(2).to(boxes_px)[:, None]
    return boxes_px.minimum(extent).clamp(min=0)


def box_areas(boxes_px: Tensor) -> Tensor:
    """float[..., 4] -> float[...]; 0 for inverted boxes."""
    return (boxes_px[..., 2:] - boxes_px[..., :2]).clamp(min=0).prod(-1)


class Match(NamedTuple):
    """`object_index` int64[B, S] of the box with the largest IoU, and `is_object` bool[B, S]:
    whether that reaches the threshold."""

    object_index: Tensor
    is_object: Tensor


def match(proposals_px: Tensor, boxes_px: Tensor, valid: Tensor, min_iou: float) -> Match:
    """Proposals float32[B, S, 4] to ground truth float32[B, K, 4], bool[B, K]; K at least 1."""
    iou = torch.vmap(box_iou)(proposals_px, boxes_px)  # (B, S, K)
    best, index = iou.masked_fill(~valid[:, None], 0.0).max(-1)
    return Match(index, best >= min_iou)


def sample_proposals(
    proposals_px: Tensor,
    is_object: Tensor,
    num_samples: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Those that train the second stage: float32[B, S, 4], the objects first, else in order.

    Objects are drawn at random up to their quota, the rest is background. Surplus objects would
    be wrong as background: where there is too little of that, zeros fill up.

    Args:
        proposals_px: float32[B, n, 4].
        is_object: bool[B, n].
        num_samples: S is the smaller of this and n.
        positive_fraction: quota of the objects.
        generator: of the randomness.
    """
    device = proposals_px.device if generator is None else generator.device
    noise = torch.rand(is_object.shape, generator=generator, device=device).to(proposals_px.device)
    rank = (noise + is_object).argsort(1, descending=True).argsort(1)
    kept = is_object & (rank < int(num_samples * positive_fraction))
    proposals_px = proposals_px.masked_fill((is_object & ~kept)[..., None], 0.0)
    priority = noise + kept + (box_areas(proposals_px) > 0)
    chosen = priority.topk(min(num_samples, noise.shape[1])).indices.sort(1).values
    objects_first = kept.gather(1, chosen).long().argsort(dim=1, descending=True, stable=True)
    return take_rows(proposals_px, chosen.gather(1, objects_first))


class ScoredBoxes(NamedTuple):
    """`boxes_px` float32[B, M, 4] and `scores` float32[B, M], best first; padding scores 0."""

    boxes_px: Tensor
    scores: Tensor


def suppress(boxes_px: Tensor, scores: Tensor, max_iou: float, limit: int) -> ScoredBoxes:
    """Greedy non-maximum suppression of every image; at most `limit` of the n boxes remain.

    Args:
        boxes_px: float32[B, n, 4].
        scores: float32[B, n]; boxes without a positive score never remain.
        max_iou: boxes that overlap a better one by this much go.
    """
    # The release removes at the threshold itself, torchvision above it.
    below = torch.tensor(max_iou).nextafter(torch.tensor(0.0)).item()
    scores = scores.clamp(min=0)
    kept = [nms(*image, below)[:limit] for image in zip(boxes_px, scores, strict=True)]
    index = pad_sequence(kept, batch_first=True, padding_value=scores.shape[1])
    boxes = take_rows(F.pad(boxes_px, (0, 0, 0, 1)), index)  # the row of zeros behind the last
    scores = F.pad(scores, (0, 1)).gather(1, index)
    return ScoredBoxes(boxes * (scores > 0)[..., None], scores)


def encode_deltas(boxes_px: Tensor, proposals_px: Tensor, weight: float) -> Tensor:
    """How to move proposals onto boxes, float[..., 4]: shifts of the centre and log growth.

    `weight` multiplies the shifts, half of it the growth. Both boxes need an area.
    """
    size, proposal_size = (box[..., 2:] - box[..., :2] for box in (boxes_px, proposals_px))
    shift = (boxes_px[..., :2] + size / 2 - proposals_px[..., :2]) / proposal_size - 0.5
    return torch.cat([shift * weight, (size / proposal_size).log() * (weight / 2)], dim=-1)


def decode_deltas(deltas: Tensor, proposals_px: Tensor, weight: float) -> Tensor:
    """The inverse of `encode_deltas`, as boxes."""
    proposal_size = proposals_px[..., 2:] - proposals_px[..., :2]
    center = proposals_px[..., :2] + (deltas[..., :2] / weight + 0.5) * proposal_size
    growth = (deltas[..., 2:] / (weight / 2)).clamp(max=MAX_GROWTH)
    half = growth.exp() * proposal_size / 2
    return torch.cat([center - half, center + half], dim=-1)


def rescore(scores: Tensor, log_probs: Tensor) -> Tensor:
    """Confidence in captioned detections: the geometric mean of box and caption probability.

    Both float32 and broadcast; `log_probs` are natural logarithms.
    """
    return (scores.clamp(min=0) * log_probs.exp()).sqrt()


class RankedCaptions(NamedTuple):
    """The best n of all captions of all detections, best first: `scores` float32[B, n] and int64
    indices [B, n] of the `detection` and of the `beam` among its captions."""

    scores: Tensor
    detection: Tensor
    beam: Tensor


def rank_captions(scores: Tensor, log_probs: Tensor, limit: int) -> RankedCaptions:
    """Rescore every beam of every detection; a detection may come several times, or never.

    Args:
        scores: float32[B, M] of the detections.
        log_probs: float32[B, M, beams] of their captions.
        limit: n.
    """
    best, index = rescore(scores[..., None], log_probs).flatten(1).topk(limit)
    beams = log_probs.shape[-1]
    return RankedCaptions(best, index // beams, index % beams)
