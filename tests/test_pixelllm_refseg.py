"""The whole segmenting model against the official one at tiny size (golden `pixel_llm_refseg*`)."""

from __future__ import annotations

import pytest
import torch
from conftest import GoldenCase, golden_names, load_golden
from official_model import Inputs, official_model
from torch.testing import assert_close

from pixelllm.boxes import points_to_boxes
from pixelllm.losses import mask_loss, point_loss, text_loss, token_mask
from pixelllm.models.pixelllm import Prediction


class Answer:
    """What our model says to the case's batch; boxes in pixels of the frame."""

    def __init__(self, case: GoldenCase) -> None:
        self.case, self.inputs = case, Inputs(case)
        h = case.hparams["model"]
        model = official_model(case)
        sizes, text = self.inputs.sizes, self.inputs.text
        with torch.no_grad():
            features = model.encode(self.inputs.images, sizes, {})
            self.prediction: Prediction = model.read(features, sizes, self.inputs.boxes, text)
            self.points_px = self.inputs.points_px(self.prediction.points)  # (B, K, T, 2, 2)
            ids = text.token_ids.unflatten(0, self.points_px.shape[:2])
            special = (h["begin_token_id"], h["end_token_id"], 0)
            self.is_place = token_mask(ids, h["point_output_ignore"], *special)  # (B, K, T)
            self.boxes_px = points_to_boxes(
                self.points_px.flatten(2, 3), self.is_place.repeat_interleave(2, dim=2)
            )
            # With random weights the mask decoder turns rounding of 1e-4 in what comes before
            # it into 4e-3, so it starts from the official boxes and visual tokens.
            official = "out.infer_given_text"
            boxes = case.tensor(f"{official}.detection_boxes") / self.inputs.scale[:, None]
            prefix = case.tensor(f"{official}.visual_features")
            words = self.prediction._replace(prefix=prefix)
            self.masks, self.ious = model.segment(features, sizes, boxes, words, None)

    def check(self, found: torch.Tensor, key: str) -> None:
        assert_close(found, self.case.tensor(key), **self.case.tolerance)


@pytest.fixture(scope="module", params=golden_names("pixel_llm_refseg"))
def answer(request: pytest.FixtureRequest) -> Answer:
    return Answer(load_golden(request.param))


def test_golden_words_become_a_box(answer: Answer):
    """Catches points read at another token than the one before the end."""
    for forward in ("infer_given_text", "train_forward"):
        answer.check(answer.prediction.prefix, f"out.{forward}.visual_features")
        answer.check(answer.points_px, f"out.{forward}.point_coords")
        answer.check(answer.is_place, f"out.{forward}.point_valid_mask")
        answer.check(answer.boxes_px, f"out.{forward}.detection_boxes")


def test_golden_a_box_and_its_words_become_a_mask(answer: Answer):
    """Catches another box unit, feature map, adapter input or one of SAM's other three masks."""
    masks, ious = answer.masks, answer.ious
    answer.check(masks, "out.infer_given_text.detection_masks")
    answer.check(ious, "out.infer_given_text.iou_predictions")
    answer.check(masks[:, :, None], "out.train_forward.detection_masks")
    answer.check(ious[..., None], "out.train_forward.iou_predictions")


def test_golden_segmenting_model_has_the_official_training_losses(answer: Answer):
    """Catches masks, padding or rows that count where they should not, and a wrong weight."""
    case, h = answer.case, answer.case.hparams["model"]
    rows = case.tensor("in.label.labels") > 0  # (B, K)
    masks = mask_loss(
        answer.masks[:, :, None],
        answer.ious[..., None],
        case.tensor("in.label.masks")[..., 0],
        rows,
        case.tensor("in.padding_mask") == 0,
    )
    for name in ("focal", "dice", "iou_pred"):
        answer.check(getattr(masks, name.removesuffix("_pred")), f"out.train.mask_{name}_loss")
    answer.check(masks.total, "out.train.mask_loss")
    ids = answer.inputs.text.token_ids
    text = text_loss(answer.prediction.logits, ids, rows.flatten(), 0, h["end_token_id"])
    answer.check(text, "out.train.text_loss")
    corners = case.tensor("in.label.boxes").unflatten(-1, (2, 2))  # (B, K, 2, 2)
    targets = corners[:, :, None].expand_as(answer.points_px)
    valid = answer.is_place & rows[..., None]
    points = point_loss(answer.points_px, targets, valid, h["point_loss_type"])
    answer.check(points, "out.train.point_loss")
    weights = [case.tensor(f"in.label.{name}_loss_valid_mask").mean() for name in ("cap", "point")]
    answer.check(weights[0] * text, "out.train.text_loss_scaled")
    answer.check(h["point_loss_weight"] * weights[1] * points, "out.train.point_loss_scaled")
    total = weights[0] * text + h["point_loss_weight"] * weights[1] * points + masks.total
    answer.check(total, "out.train.total_loss")
