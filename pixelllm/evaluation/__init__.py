"""Scores of the paper's tasks: plain records in, numbers out.

Boxes are xyxy and points (x, y), both in [0, 1] of the original image; scores are fractions. No
name below needs the model or its libraries. Published METEOR numbers come from `score_meteor`.

Captions, one or more references each (BLEU, ROUGE-L, CIDEr-D):

    >>> from pixelllm.evaluation import *
    >>> scores = score_captions({"7": "a red bus", "8": "a dog"},
    ...                         {"7": ["a red bus", "the bus"], "8": ["a cat"]})
    >>> round(scores["rouge_l"], 2)
    0.75

Traces: LBM of a box per word, and L1 of the points of each token:

    >>> word_boxes = [(0.1, 0.1, 0.2, 0.2), (0.5, 0.5, 0.8, 0.8)]
    >>> trace_distance(word_boxes, word_boxes)
    0.0
    >>> points, target = [[(0.5, 0.5)]], [[(0.5, 0.6), (0.9, 0.9)]]  # one token
    >>> round(mean_trace_l1([(points, target, [True])]), 3)
    0.05

Referring, by expression; masks are bool arrays or COCO run lengths of the image's size:

    >>> score_referred_boxes({"left dog": (0, 0, 0.5, 0.8)}, {"left dog": (0, 0, 0.5, 1)})
    {'box_precision': 1.0, 'box_iou': 0.8}
    >>> import numpy as np
    >>> mask, box = np.eye(4, 4) > 0, (0, 0, 1, 1)
    >>> scores = score_referred_masks({"left dog": mask}, {"left dog": mask}, {"left dog": box})
    >>> round(scores["mask_ciou"], 3), scores["mask_box_precision"]
    (1.0, 1.0)

Dense captions, by image; published numbers take METEOR as the similarity:

    >>> def is_equal(captions, references):
    ...     return [float(text in texts) for text, texts in zip(captions, references)]
    >>> found = {7: [Detection((0, 0, 0.5, 0.5), score=0.9, caption="a dog")]}
    >>> truth = {7: [Region((0, 0, 0.5, 0.4), "a dog"), Region((0.6, 0.6, 1, 1), "grass")]}
    >>> scores = score_dense_captions(found, truth, is_equal)
    >>> scores["map"], scores["map_detection"]
    (0.51, 0.51)
    >>> coco_results(found, {7: (480, 640)})[0]["bbox"]
    [0.0, 0.0, 320.0, 240.0]

Captions of given boxes are scored by `score_region_captions`, one reference per box or those of
all boxes in the same place:

    >>> grouped_references([{"a": Region((0, 0, 0.5, 0.5), "a dog"),
    ...                      "b": Region((0, 0, 0.5, 0.45), "a puppy")}])
    {'a': ['a dog', 'a puppy'], 'b': ['a dog', 'a puppy']}
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "captions": ("score_captions",),
    "meteor": ("score_meteor",),
    "lbm": ("trace_distance", "trace_distance_given_caption"),
    "points": ("trace_l1", "mean_trace_l1"),
    "referring": ("score_referred_boxes", "score_referred_masks"),
    "dense": ("Detection", "Region", "score_dense_captions"),
    "regions": ("grouped_references", "score_region_captions"),
    "results": ("coco_results",),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Load a score's module when it is asked for."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
