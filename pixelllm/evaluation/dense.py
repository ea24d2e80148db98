"""Dense captioning mAP: boxes and their captions, scored together (reference, §12.4).

The protocol of DenseCap (Johnson et al., CVPR 2016) as the official evaluation has it: IoU without
DenseCap's extra pixel. Recall is compared in whole numbers, which no rounding can tip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pixelllm.evaluation.overlap import box_iou, check_same_ids, checked_boxes

MERGE_IOU = 0.7
IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
METEOR_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
RECALL_LEVELS = 100  # 0.00, 0.01, ... 0.99

Box = tuple[float, float, float, float]
# Of each candidate with its references, in [0, 1]; METEOR of raw captions for published numbers.
Similarity = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]


class Region(NamedTuple):
    """A box of the ground truth, xyxy in [0, 1] of the image; VG has a few empty captions."""

    box: Box
    caption: str


class Detection(NamedTuple):
    """A predicted box, xyxy in [0, 1] of the image.

    Args:
        caption: None where only boxes are predicted.
        mask: COCO run lengths, `{"size": [H, W], "counts": str}`.
    """

    box: Box
    score: float
    caption: str | None = None
    mask: Mapping[str, Any] | None = None


class Group(NamedTuple):
    """Regions of one image that overlap: their mean box and all their captions."""

    box: np.ndarray  # float64[4]
    captions: list[str]


class _Match(NamedTuple):
    """What a detection amounts to."""

    score: float
    iou: float  # with the group it overlaps most
    takes: bool  # whether it is the first to look at that group
    caption: str | None
    references: list[str]


def score_dense_captions(
    predictions: Mapping[Any, Sequence[Detection]],
    truths: Mapping[Any, Sequence[Region]],
    similarity: Similarity | None = None,
    *,
    count_empty: bool = True,
) -> dict[str, float]:
    """Average precision of boxes, and of boxes with captions where a similarity is given.

    In an image, each detection in decreasing score looks at the one group of ground truth that it
    overlaps most. It is a hit if no other looked there before, the IoU reaches the threshold and
    the similarity to the group's captions is above its threshold. On equal scores the earlier
    detection comes first.

    Args:
        predictions: by image. Every image needs an entry, an empty one where nothing is found.
        truths: by image, empty where an image has none: what is found there are false alarms.
        similarity: asked once, for all detections that could be hits.
        count_empty: a detection that takes a group with an empty caption has the right caption
            (the official default). False: it is judged by the group's captions like any other,
            and the group is not among those to be found, so recall can exceed 1 (as officially).

    Returns:
        `map_detection` and `ap_iou0.3` ... of boxes alone; with a similarity also `map`, the mean
        of `ap_iou0.3_meteor0.00` ... over 5 x 6 thresholds.

    Raises ValueError on images of one side only, and where no image has ground truth.
    """
    check_same_ids(predictions, truths, "images")
    merged = {key: merge_regions(regions, f"truth of {key}") for key, regions in truths.items()}
    found = [
        match for key, groups in merged.items() for match in _match(predictions[key], groups, key)
    ]
    found.sort(key=lambda match: -match.score)
    num_truths = sum(
        count_empty or "" not in group.captions for groups in merged.values() for group in groups
    )
    if num_truths == 0:
        raise ValueError(f"no regions in the ground truth of {len(truths)} images")
    ious = np.array([match.iou if match.takes else -1.0 for match in found])
    hits = {f"ap_iou{t}": ious >= t for t in IOU_THRESHOLDS}
    scores = _precisions("map_detection", hits, num_truths)
    if similarity is None:
        return scores
    similarities = _similarities(found, similarity, count_empty)
    hits = {
        f"{name}_meteor{t:.2f}": hit & (similarities > t)
        for name, hit in hits.items()
        for t in METEOR_THRESHOLDS
    }
    return _precisions("map", hits, num_truths) | scores


def merge_regions(regions: Sequence[Region], name: str = "regions") -> list[Group]:
    """Groups of one image's ground truth, see `group_boxes`."""
    boxes = checked_boxes([box for box, _ in regions], name)
    return [
        Group(boxes[members].mean(axis=0), [regions[i][1] for i in members])
        for members in group_boxes(boxes)
    ]


def group_boxes(boxes: ArrayLike) -> list[np.ndarray]:
    """Positions of the float[N, 4] boxes that belong together, each in exactly one group.

    Again and again the box with most others at an IoU of 0.7 or more becomes a group with them,
    the first one on ties.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    near = box_iou(boxes[:, None], boxes) >= MERGE_IOU
    np.fill_diagonal(near, True)  # an empty box too
    groups = []
    while near.any():
        members = np.flatnonzero(near[near.sum(axis=1).argmax()])
        groups.append(members)
        near[members] = False
        near[:, members] = False
    return groups


def average_precision(hits: ArrayLike, num_truths: int) -> float:
    """Mean over 100 levels of recall of the best precision at that recall or a higher one.

    Args:
        hits: bool[P], by decreasing score.
        num_truths: number of things to find, at least 1.
    """
    ranks = np.flatnonzero(hits) + 1
    precision = np.arange(1, len(ranks) + 1) / ranks
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # Hits that reach each level, rounded up.
    needed = (np.arange(RECALL_LEVELS) * num_truths + RECALL_LEVELS - 1) // RECALL_LEVELS
    needed = needed.clip(min=1)
    return float(best[needed[needed <= len(best)] - 1].sum() / RECALL_LEVELS)


def _precisions(mean: str, hits: Mapping[str, np.ndarray], num_truths: int) -> dict[str, float]:
    """Average precisions by name, after their mean."""
    values = {name: average_precision(hit, num_truths) for name, hit in hits.items()}
    return {mean: float(np.mean(list(values.values()))), **values}


def _match(detections: Sequence[Detection], groups: Sequence[Group], image: Any) -> list[_Match]:
    """By decreasing score."""
    name = f"predictions of {image}"
    detections = sorted((Detection(*item) for item in detections), key=lambda item: -item.score)
    if not np.isfinite([item.score for item in detections]).all():
        raise ValueError(f"{name}: a score is NaN or infinite")
    boxes = checked_boxes([item.box for item in detections], name)
    if not groups:
        return [_Match(item.score, 0.0, False, item.caption, []) for item in detections]
    ious = box_iou(boxes[:, None], [group.box for group in groups])  # (P, groups)
    matches, taken = [], set()
    for item, best, iou in zip(detections, ious.argmax(axis=1), ious.max(axis=1), strict=True):
        takes = iou > 0 and best not in taken
        if takes:
            taken.add(best)
        matches.append(_Match(item.score, iou, takes, item.caption, groups[best].captions))
    return matches


def _similarities(
    matches: Sequence[_Match], similarity: Similarity, count_empty: bool
) -> np.ndarray:
    """float64[P], of each caption to its references; only those that can matter are asked for."""
    values = np.full(len(matches), -np.inf)
    asked = []
    for place, match in enumerate(matches):
        if match.takes and match.iou >= min(IOU_THRESHOLDS):
            if count_empty and "" in match.references:
                values[place] = np.inf
            else:
                asked.append(place)
    captions = [matches[place].caption for place in asked]
    if None in captions:
        raise ValueError("a detection has no caption; leave the similarity out to score boxes")
    if asked:
        values[asked] = similarity(captions, [matches[place].references for place in asked])
    return values
