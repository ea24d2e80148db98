"""Where in an image expressions point: a box, a score and optionally a mask for each.

Paper, section 3.4; reference, sections 5.5 and 6.4: the expression is given as context and as
words, the box is read at its last word, and SAM's mask decoder fills it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torchvision.ops import generalized_box_iou

from pixelllm.boxes import points_to_boxes
from pixelllm.images import restore_mask
from pixelllm.mask_codes import decode_mask, encode_mask, trace_mask
from pixelllm.models.pixelllm import ImageFeatures, PixelLLMNetwork, Prediction, Text
from pixelllm.records import Box

SURE = 0.3  # score of a detection that a box may snap to


@dataclass(frozen=True)
class Location:
    """What an expression points at.

    `box` is xyxy in [0, 1] of the image. `score` is the probability per word that the model
    gives the expression as a caption of that box. It compares captions of one form: words that
    captions do not have (relations, "the") make it small whatever is there. `mask` is COCO's
    run-length encoding at the image's size. `caption` is what the model calls that box by itself:
    where an expression fits no object it names another one. Both are None where not asked for.
    """

    box: Box
    score: float
    mask: dict[str, Any] | None = None
    caption: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; with a mask also its outline as `polygons` in [0, 1]."""
        found = {"box": list(self.box), "score": self.score}
        if self.caption is not None:
            found["caption"] = self.caption
        if self.mask is not None:
            found |= {"mask": self.mask, "polygons": trace_mask(decode_mask(self.mask))}
        return found


class Located(NamedTuple):
    """`boxes` float32[B, K, 4] in [0, 1] of the images and the prediction they were read from."""

    boxes: Tensor
    prediction: Prediction


def locate_boxes(
    model: PixelLLMNetwork,
    features: ImageFeatures,
    sizes: Tensor,
    boxes: Tensor,
    text: Text,
    is_place: Tensor,
) -> Located:
    """Boxes of expressions, corners in order and inside the image.

    Args:
        boxes: float32[B, 1, 4], the location prompts.
        text: the expressions, as context and as words.
        is_place: bool[R, T], the word that says where, one a row.
    """
    prediction = model.read(features, sizes, boxes, text)
    B, R = len(sizes), len(is_place)
    points = prediction.points.flatten(1, 2)  # (R, 2 T, 2)
    found = points_to_boxes(points, is_place.repeat_interleave(2, dim=1))
    return Located(found.clamp(0, 1).view(B, R // B, 4), prediction)


def snap_boxes(boxes: Tensor, detected: Tensor, scores: Tensor) -> Tensor:
    """For every box the detection that fits it best, by generalised IoU.

    A detector knows better where an object ends than the last word of an expression does. This
    is ours; the release takes the box of the words as it is.

    Args:
        boxes: float32[B, K, 4].
        detected: float32[B, M, 4], in the same units.
        scores: float32[B, M]; detections below `SURE` do not count.

    Returns:
        float32[B, K, 4]; an image without any sure detection keeps its boxes.
    """
    snapped = boxes.clone()
    for image, is_sure in enumerate(scores >= SURE):
        if is_sure.any():
            candidates = detected[image, is_sure]
            fit = generalized_box_iou(boxes[image], candidates)  # (K, M)
            snapped[image] = candidates[fit.argmax(1)]
    return snapped


def word_probability(logits: Tensor, text: Text) -> Tensor:
    """Geometric mean of the probabilities of given words, end token included: float32[R]."""
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, text.token_ids[:, 1:, None])[..., 0]
    valid = ~text.token_padding[:, 1:]
    return ((log_probs * valid).sum(1) / valid.sum(1).clamp(min=1)).exp()


def original_mask(
    logits: Tensor, size: Tensor, frame: int, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Run lengths at the image's size from float[h, w] over the frame."""
    mask = restore_mask(logits, tuple(size.tolist()), frame, image_size)
    return encode_mask(mask.cpu().numpy())
