"""The loss terms of a batch, weighted by the recipe and by the batch's source.

Reference, section 6. A source with a weight of 0 for a term does not compute it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixelllm.batches import Batch
from pixelllm.boxes import points_to_boxes, to_pixels, to_relative
from pixelllm.config import LossConfig
from pixelllm.losses import mask_loss, point_loss, text_loss
from pixelllm.models.pixelllm import ImageFeatures, PixelLLMNetwork, Prediction


def weighted_losses(model: PixelLLMNetwork, batch: Batch, weights: LossConfig) -> dict[str, Tensor]:
    """The terms to be minimised, float32 scalars by name."""
    source = batch.source
    features = model.encode(batch.images, batch.sizes, batch.features)
    terms = {}
    if source.detection_weight:
        detection, batch = propose(model, features, batch)
        terms["detection"] = weights.detection * source.detection_weight * detection
    prediction = model.read(features, batch.sizes, batch.boxes, batch.text)
    if source.text_weight:
        text = words_loss(prediction, batch, model.language.eos_id, weights.smoothing)
        terms["text"] = weights.text * source.text_weight * text
    if source.point_weight:
        points = places_loss(prediction, batch, model.prompt_frame)
        terms["point"] = weights.point * source.point_weight * points
    if source.mask_weight:
        masks = located_mask_loss(model, features, prediction, batch)
        terms["mask"] = weights.mask * source.mask_weight * masks
    return terms


def words_loss(prediction: Prediction, batch: Batch, eos_id: int, smoothing: float) -> Tensor:
    """Cross-entropy of the words."""
    return text_loss(
        prediction.logits,
        # Padding may share its id with a real token, so the loss gets an id of its own.
        batch.text.token_ids.masked_fill(batch.text.token_padding, -100),
        ~batch.row_padding,
        pad_id=-100,
        eos_id=eos_id,
        smoothing=smoothing,
    )


def places_loss(prediction: Prediction, batch: Batch, frame: int) -> Tensor:
    """L1 of the points, in units of the padded frame.

    A weight of 0.1 * frame is thereby the official 0.1 on pixels.
    """
    frame_share = batch.sizes.flip(-1).float() / frame  # (B, 2), x and y
    scale = frame_share.repeat_interleave(batch.num_prompts, dim=0)[:, None, None]  # (R, 1, 1, 2)
    valid = batch.with_points & ~batch.row_padding[:, None]
    if batch.source.every_word:  # a long expression counts no more than a short one
        valid = valid / valid.sum(1, keepdim=True).clamp(min=1)
    return point_loss(prediction.points * scale, batch.points * scale, valid, kind="l1")


def located_mask_loss(
    model: PixelLLMNetwork, features: ImageFeatures, prediction: Prediction, batch: Batch
) -> Tensor:
    """SAM's loss on the masks of what the words locate; the boxes get no gradient."""
    is_place = batch.with_points.repeat_interleave(2, dim=1)  # (R, 2 T)
    boxes = points_to_boxes(prediction.points.flatten(1, 2), is_place)
    boxes = boxes.view(len(batch), batch.num_prompts, 4)
    words = (prediction, batch.text.token_padding)
    logits, ious = model.segment(features, batch.sizes, boxes, *words)
    rows = torch.arange(model.prompt_frame, device=boxes.device)
    outside = rows >= batch.sizes[..., None]  # (B, 2, S), rows and columns
    padding = outside[:, 0, :, None] | outside[:, 1, None]
    is_located = batch.with_points.any(-1) & ~batch.row_padding
    valid = is_located.view(boxes.shape[:2]) & batch.masks.flatten(2).any(-1)
    return mask_loss(logits[:, :, None], ious[..., None], batch.masks, valid, padding).total


def propose(model: PixelLLMNetwork, features: ImageFeatures, batch: Batch) -> tuple[Tensor, Batch]:
    """The detector's loss, and the batch asked at its proposals instead of the true boxes.

    A proposal is asked for the phrase of the box it overlaps most, others for nothing
    (reference, section 11.6).
    """
    is_phrase = (~batch.row_padding).view(batch.boxes.shape[:2])
    boxes_px = to_pixels(batch.boxes, batch.sizes)
    found = model.detector(features.fused, batch.sizes, boxes_px, is_phrase)
    first = slice(batch.source.proposals_per_image)
    boxes = to_relative(found.proposals_px[:, first], batch.sizes).clamp(0, 1)
    asked = batch.with_prompts(boxes, found.object_index[:, first], found.is_object[:, first])
    return found.losses.total, asked
